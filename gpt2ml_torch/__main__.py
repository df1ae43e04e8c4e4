"""The command line: `gpt2ml COMMAND ...`, or `python -m gpt2ml_torch COMMAND ...`.

A command's module is imported only when it runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from gpt2ml_torch.commands.parsing import Parser, flags_of, parse
from gpt2ml_torch.options import OptionError, OptionFileExistsError

COMMANDS = {  # name: module with add_arguments and run, help
    "generate": ("gpt2ml_torch.commands.generate", "continue texts"),
    "score": ("gpt2ml_torch.commands.score", "log-likelihood and perplexity of given texts"),
    "info": ("gpt2ml_torch.commands.info", "what a model file holds"),
    "quantize": ("gpt2ml_torch.commands.quantize", "store a model's weights in 8 or 4 bits"),
    "finetune": ("gpt2ml_torch.commands.finetune", "train a model on your own texts"),
    "merge": ("gpt2ml_torch.commands.merge", "add a LoRA adapter to a model's weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can cure are one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except BrokenPipeError:
        _silence_stdout()
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2
    except (ValueError, OSError) as error:
        print(f"gpt2ml: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else None
    if command not in COMMANDS:
        _overview().parse_args(arguments)  # prints the help and exits, or raises
        raise ValueError("no command was given (see gpt2ml --help)")
    path, summary = COMMANDS[command]
    module = importlib.import_module(path)
    parser = Parser(prog=f"gpt2ml {command}", description=summary)
    module.add_arguments(parser)
    try:
        status: int = module.run(parse(parser, arguments[1:]))
    except (OptionError, OptionFileExistsError) as error:
        raise ValueError(error.render(flags_of(parser))) from error
    sys.stdout.flush()
    return status


def _overview() -> argparse.ArgumentParser:
    parser = Parser(prog="gpt2ml", description="GPT2_ML: Chinese text with a converted checkpoint.")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary)
    return parser


def _silence_stdout() -> None:
    """Keep Python from flushing into the closed pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return text


if __name__ == "__main__":
    sys.exit(main())
