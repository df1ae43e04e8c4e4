"""The commands in unusual environments: closed streams, other encodings, unusable folders."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from scripts.attacks.tools import CHECKPOINT, ROOT, write_model

VARIABLES = {
    "PYTHONIOENCODING": ("ascii", "utf-8", "latin-1", "utf-16"),
    "LC_ALL": ("C", "POSIX", "C.UTF-8", "nonsense"),
    "PYTHONUTF8": ("0", "1"),
    "GPT2ML_CACHE": ("/dev/null/x", "/proc/x", ""),
    "GPT2ML_KERNELS": ("off", "avx2", "nonsense", ""),
    "HOME": ("/nonexistent", ""),
    "OMP_NUM_THREADS": ("1", "2", "nonsense", "0"),
    "CXX": ("/nonexistent", "false"),
    "COLUMNS": ("1", "0", "x"),
    "TERM": ("dumb", ""),
    "TMPDIR": ("/nonexistent",),
    "NO_COLOR": ("1",),
}
REDIRECTIONS = (
    "",
    ">&-",
    "<&-",
    "2>&-",
    ">/dev/full",
    "2>/dev/full",
    "| true",
    "</dev/null",
    ">&- 2>&-",
)


class Attack:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        model = write_model(folder / "model.safetensors")
        self._commands = (
            f"-m gpt2ml_torch info {model}",
            f"-m gpt2ml_torch info {model} --json",
            f"-m gpt2ml_torch score {model} 今天",
            f"-m gpt2ml_torch generate {model} 今天 --max-new-tokens 3 --no-compile",
            f"-m gpt2ml_torch quantize {model} --out {folder}/small.safetensors --force",
            "-m gpt2ml_torch --help",
            "-m gpt2ml_torch generate --help",
            "-m gpt2ml_torch nonsense",
            f"-m convert {CHECKPOINT} {folder}/out.safetensors --force",
            "-m convert --help",
        )

    def __call__(self, draw: random.Random) -> None:
        environment = {**os.environ}
        for name in draw.sample(list(VARIABLES), draw.randint(0, 3)):
            environment[name] = draw.choice(VARIABLES[name])
        redirection = draw.choice(REDIRECTIONS)
        line = f"ulimit -t 60; {sys.executable} {draw.choice(self._commands)} {redirection}"
        log = self._folder / "log"
        with log.open("wb") as out:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=200,
                check=False,
            )
        changed = {name: environment[name] for name in VARIABLES if name in environment}
        shown = f"{line} {changed}: status {done.returncode}: {log.read_bytes()[-500:]!r}"
        text = log.read_bytes()
        assert b"Traceback" not in text, shown
        assert b"Exception ignored" not in text, shown
        assert done.returncode in (0, 1, 2, 141), shown
