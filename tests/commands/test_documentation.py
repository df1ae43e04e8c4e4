"""The documentation names only options that exist, and `--help` explains each."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gpt2ml_torch.__main__ import COMMANDS
from gpt2ml_torch.commands.parsing import Parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])

# Options of other programs that the pages name, by program.
FOREIGN = {
    "vllm": {
        *("--trust-remote-code", "--tensor-parallel-size", "--data-parallel-size"),
        "--pipeline-parallel-size",
        *("--data-parallel-size-local", "--data-parallel-address"),
    },
    "lm_eval": {"--tasks", "--include"},
    "scripts/vllm-check": {"--eager"},
}


def parser_of(command: str) -> Parser:
    path, _ = COMMANDS[command]
    parser = Parser(prog=command)
    importlib.import_module(path).add_arguments(parser)
    return parser


@cache
def flags(command: str) -> frozenset[str]:
    """Every option of one of our commands."""
    actions = parser_of(command)._actions
    return frozenset(flag for action in actions for flag in action.option_strings)


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each command in the page's blocks of shell, continued lines joined."""
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", page, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


def command_of(words: list[str]) -> str | None:
    """Which of our commands the words call, if any."""
    for program in (["gpt2ml"], ["python", "-m", "gpt2ml_torch"]):
        for at in range(len(words) - len(program)):
            if words[at : at + len(program)] == program and words[at + len(program)] in COMMANDS:
                return words[at + len(program)]
    return "convert" if words[:3] == ["python", "-m", "convert"] else None


def unknown_options(page: str) -> list[str]:
    """Options in a page that no command, or not the command that they are given to, has."""
    known = frozenset().union(*FOREIGN.values(), *(flags(command) for command in COMMANDS))
    named = re.findall(r"`(--[a-z][a-z0-9-]*)", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S))
    unknown = [flag for flag in named if flag not in known]
    for words in command_lines(page):
        command = command_of(words)
        given = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        if command is not None:
            unknown += [f"{command} {flag}" for flag in given if flag not in flags(command)]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_a_page_exists(page: Path) -> None:
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_commands_in_the_pages_are_recognised() -> None:
    found = {
        command_of(words)
        for page in PAGES
        for words in command_lines(page.read_text(encoding="utf-8"))
    }
    assert {"convert", "generate", "finetune", "check", "serve", "export"} <= found


def test_an_option_of_another_command_is_noticed() -> None:
    page = "`--nowhere`\n```bash\ngpt2ml info m.safetensors \\\n  --top-k 5\n```\n"
    assert unknown_options(page) == ["--nowhere", "info --top-k"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    assert [action.dest for action in parser_of(command)._actions if not action.help] == []
