"""What Windows lacks is not needed: as far as that can be told without Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import numpy, safetensors, tempfile, shutil, subprocess, torch  # they know what to do on Windows
for name in ("pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate",
             "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
os_open = os.open
def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os_open(path, *arguments, **options)
os.open = open_no_folder
replace = os.replace
def replace_no_open_file(source, target):
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not {os.path.realpath(source), os.path.realpath(target)} & held, "is open"
    replace(source, target)
os.replace = replace_no_open_file
"""


def run_without_posix(code: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_converted_saved_loaded_and_written_from(tmp_path: Path) -> None:
    code = """
from convert.__main__ import main
from gpt2ml_torch import GPT2ML, Generator, Tokenizer
checkpoint, out = sys.argv[1:]
assert main([checkpoint, out]) == 0
assert main([checkpoint, out, "--force"]) == 0
model, tokenizer = GPT2ML.from_pretrained(out), Tokenizer.from_pretrained(out)
model.save_pretrained(out + "2", tokenizer=tokenizer)
model = GPT2ML.from_pretrained(out + "2")
text, = Generator(model, tokenizer, compile=False).generate("春", max_new_tokens=5)
assert main(["--to-tf", out, out + "-back"]) == 0
try:
    with __import__("gpt2ml_torch.modelfile.writer", fromlist=["x"]).ModelWriter(
        out, model.config, dtype="float32", overwrite=True
    ):
        raise KeyError
except KeyError:
    assert not os.path.exists(out + ".partial")
"""
    run_without_posix(code, ROOT / "checkpoints" / "demo", tmp_path / "model")


def test_every_module_is_imported() -> None:
    code = """
import importlib, pkgutil, convert, gpt2ml_torch
for package in (gpt2ml_torch, convert):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # What imports transformers is left to it: without POSIX's modules it means real Windows.
        if not module.name.endswith("__main__") and not module.name.startswith("gpt2ml_torch.hf"):
            importlib.import_module(module.name)
"""
    run_without_posix(code)
