"""Arbitrary flags with arbitrary values: a result, or one line of error and status 2."""

from __future__ import annotations

import argparse
import importlib
import os
import random
from pathlib import Path

from gpt2ml_torch.__main__ import COMMANDS
from gpt2ml_torch.commands.parsing import Parser
from scripts.attacks.tools import run_command, write_model

WORDS = (
    *(
        "0",
        "1",
        "-1",
        "7",
        "1.5",
        "1e308",
        "nan",
        "inf",
        "-inf",
        "99999999999999999999",
        "2147483648",
    ),
    *(
        "",
        " ",
        "今天",
        "auto",
        "none",
        "int4",
        "cpu",
        "cuda",
        "meta",
        "mps",
        "last:1",
        "0-99999999999",
    ),
    *("x" * 5000, "[SEP]", "\x1b[31m", "/dev/null", "/nonexistent/x", "~", "-", "--", "\udcff"),
)
STATUSES = {"check": (0, 1, 2)}  # 1: a check failed
QUICK = {  # arguments with which a command ends quickly and does not wait for input
    "finetune": ["--dry-run"],
    "generate": ["今天", "--max-new-tokens", "2"],
    "score": ["今天"],
}


class Attack:
    def __init__(self, folder: Path) -> None:
        os.chdir(folder)  # a value that is used as a file name does no harm here
        self._model = write_model(folder / "model.safetensors")
        Path("text.txt").write_text("春眠不觉晓。\n\n今天天气不错。\n" * 20, encoding="utf-8")
        self._flags = {name: self._options(name) for name in COMMANDS if name != "serve"}

    def _options(self, name: str) -> list[argparse.Action]:
        parser = Parser(prog=name)
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        return [action for action in parser._actions if action.option_strings]

    def __call__(self, draw: random.Random) -> None:
        name = draw.choice(list(self._flags))
        words = [name, str(self._model)]
        if name == "finetune":
            words += ["text.txt", "--out", "tuned.safetensors"]
        words += QUICK.get(name, [])
        for action in draw.sample(
            self._flags[name], min(draw.randint(1, 3), len(self._flags[name]))
        ):
            flag = draw.choice(action.option_strings)
            if flag in ("-h", "--help", "--version"):
                continue
            words.append(flag)
            if action.nargs != 0:
                good = [str(choice) for choice in action.choices or ()]
                words.append(draw.choice([*good, *WORDS]))
        status, text = run_command(words)
        assert status in STATUSES.get(name, (0, 2)), f"{words[:9]}: status {status}: {text[-300:]}"
