"""The command line: `gpt2ml COMMAND ...`, or `python -m gpt2ml_torch COMMAND ...`.

A command's module is imported only when it runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import gpt2ml_torch
from gpt2ml_torch.commands.parsing import Parser, parse, run_command
from gpt2ml_torch.commands.paths import find_model
from gpt2ml_torch.commands.program import run_program
from gpt2ml_torch.options import suggestion

_CONVERT = "convert"  # a program of its own, which this package never imports for itself
COMMANDS = {  # name: module with EXAMPLES, add_arguments and run, help
    "convert": ("convert.__main__", "make a model file from a published checkpoint, or back"),
    "generate": ("gpt2ml_torch.commands.generate", "continue texts"),
    "score": ("gpt2ml_torch.commands.score", "log-likelihood and perplexity of given texts"),
    "check": ("gpt2ml_torch.commands.check", "prove that a converted model is right"),
    "info": ("gpt2ml_torch.commands.info", "what a model file holds"),
    "quantize": ("gpt2ml_torch.commands.quantize", "store a model's weights in 8 or 4 bits"),
    "finetune": ("gpt2ml_torch.commands.finetune", "train a model on your own texts"),
    "serve": ("gpt2ml_torch.commands.serve", "answer OpenAI's clients, and show a page"),
    "merge": ("gpt2ml_torch.commands.merge", "add a LoRA adapter to a model's weights"),
    "export": ("gpt2ml_torch.commands.export", "write a folder for transformers, vLLM, TRL ..."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status; an error that the user can cure is one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_program("gpt2ml", lambda: _run(words))


def _run(words: list[str]) -> int:
    command = words[0] if words else ""
    if command == _CONVERT:
        convert = importlib.import_module("convert.__main__").main
        converted: int = convert(words[1:], program="gpt2ml convert")
        return converted
    if command not in COMMANDS:
        parse(_overview(), words if command.startswith("-") else [])  # --help ends here
        names = list(COMMANDS)
        known = f"expected one of {', '.join(names)}"
        hint = suggestion(command, names) or known
        problem = f"unknown command {command!r}" if command else "no command was given"
        raise ValueError(f"{problem}; {hint if command else known} (see gpt2ml --help)")
    path, summary = COMMANDS[command]
    module = importlib.import_module(path)
    parser = Parser(prog=f"gpt2ml {command}", description=summary, examples=module.EXAMPLES)
    module.add_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        if "model" in arguments:
            arguments.model = find_model(os.path.expanduser(arguments.model))
        status: int = module.run(arguments)
        return status

    return run_command(parser, words[1:], run)


def _overview() -> argparse.ArgumentParser:
    summaries = {_CONVERT: "make a model file of a checkpoint or an exported folder"}
    summaries |= {name: summary for name, (_, summary) in COMMANDS.items()}
    commands = "".join(f"  {name:10} {summary}\n" for name, summary in summaries.items())
    parser = Parser(
        prog="gpt2ml",
        usage="gpt2ml COMMAND ...",
        description="GPT2_ML: Chinese text with a converted checkpoint.\n\ncommands:\n" + commands,
        examples=(
            "gpt2ml convert ckpt_dir out.safetensors",
            "gpt2ml generate out.safetensors 今天天气不错",
        ),
    )
    version = f"gpt2ml {gpt2ml_torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


if __name__ == "__main__":
    sys.exit(main())
