"""Command-line parsers made from the fields of dataclasses (`gpt2ml_torch.options`).

    parser = Parser(prog="tool")
    add_options(parser, Settings)
    arguments = parse(parser, ["--steps", "3"])        # "unknown option --stpes; did you mean ..."
    settings = Settings(**given(arguments, Settings))  # only what was given: {"steps": 3}

An `OptionError` that the library raises is shown with flags: `error.render(flags_of(parser))`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from gpt2ml_torch.options import (
    Namer,
    OptionError,
    OptionField,
    OptionFileExistsError,
    option_fields,
    python_name,
    suggestion,
)

_NEGATIVE_NUMBER = re.compile(
    r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help ends with examples and whose errors are `ValueError`s."""

    def __init__(self, *, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        # argparse's own takes -1e-3 and -inf for options.
        self._negative_number_matcher = _NEGATIVE_NUMBER
        if examples:
            self.epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own hides that help and version could not be written.
        (file or sys.stdout).write(message)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def add_options(parser: argparse.ArgumentParser, cls: type, *, without: Iterable[str] = ()) -> None:
    """Add the options of a dataclass to a parser, in their groups.

    What isn't given on the command line is absent from the result of parsing; see `given`.
    """
    groups: dict[str, Any] = {"options": parser}
    for field in option_fields(cls):
        if field.option.hidden or field.name in without:
            continue
        title = "options" if field.option.positional else field.option.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names, settings = _argument(field)
        groups[title].add_argument(*names, **settings)


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The values of a dataclass's options that were given on the command line."""
    values = {}
    for field in option_fields(cls):
        if hasattr(arguments, field.name):
            value = getattr(arguments, field.name)
            values[field.name] = tuple(value) if field.many else value
    return values


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse options and arguments in any order; raises `ValueError` for unknown ones."""
    # Intermixed: `MODEL --seed 1 PROMPT` would otherwise leave PROMPT over.
    arguments, unknown = parser.parse_known_intermixed_args(words)
    for word in unknown:
        if not word.startswith("-"):
            continue
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = suggestion(word.split("=")[0], flags) or f"see {parser.prog} --help"
        if any(action.nargs in ("*", "+") for action in _positionals(parser)):
            hint += " (text that begins with - goes behind --)"
        raise ValueError(f"unknown option {word}; {hint}")
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r} (see {parser.prog} --help)")
    return arguments


def run_command(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Parse and run; the library's errors then name flags. Raises what both raise."""
    try:
        return run(parse(parser, words))
    except (OptionError, OptionFileExistsError) as error:
        raise ValueError(error.render(flags_of(parser))) from error


def flags_of(parser: argparse.ArgumentParser) -> Namer:
    """The flags of a parser's options, by field and value."""
    actions = {action.dest: action for action in parser._actions}  # argparse has no public list

    def namer(name: str, value: str | None) -> str:
        action = actions.get(name)
        if action is None:
            return python_name(name, value)
        if not action.option_strings:
            return str(action.metavar or name)
        flags = action.option_strings
        if value is None or value == str(action.const):
            return flags[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            negative = [flag for flag in flags if flag.startswith("--no-")]
            return flags[0] if value == "True" else negative[0]
        if value in ("True", "False"):
            return f"no {flags[0]}"
        return f"{flags[0]} {value}"

    return namer


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not action.option_strings]


def _argument(field: OptionField) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The arguments of `add_argument` for an option."""
    required = field.default is dataclasses.MISSING
    settings: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS}
    if field.option.metavar is not None or field.option.positional:
        settings["metavar"] = field.option.metavar or field.name.upper()
    if field.option.positional:
        settings["nargs"] = ("+" if required else "*") if field.many else None if required else "?"
        return (field.name,), settings | _conversion(field)
    settings["dest"] = field.name
    if required:
        settings["required"] = True
    if field.kind is bool:
        return field.flags, settings | _switch(field)
    if field.many and field.option.split is None:
        settings["action"] = "append"
    elif field.choices and not field.many:
        settings["choices"] = field.choices
    return field.flags, settings | _conversion(field)


def _switch(field: OptionField) -> dict[str, Any]:
    if field.option.inverted:
        return {"action": "store_false"}
    if field.option.flags:
        return {"action": "store_true"}
    return {"action": argparse.BooleanOptionalAction}


def _conversion(field: OptionField) -> dict[str, Any]:
    converters: dict[type, Callable[[str], Any]] = {int: _whole_number, float: _number}
    convert = converters.get(field.kind or str)
    separator = field.option.split
    if separator is not None:
        return {
            "type": lambda text: tuple(map(convert or str, filter(None, text.split(separator))))
        }
    if field.option.path:
        convert = os.path.expanduser  # a shell leaves ~ alone in quotes and behind =
    return {} if convert is None else {"type": convert}


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _help(field: OptionField) -> str:
    notes = []
    if field.many and not field.option.positional and field.option.split is None:
        notes.append("repeatable")
    default = field.option.default_text
    if default is None and not (
        field.default in (None, dataclasses.MISSING, (), "") or isinstance(field.default, bool)
    ):
        joint = field.option.split or ", "
        default = joint.join(field.default) if field.many else str(field.default)
    if default:
        notes.append(f"default: {default}")
    text = field.option.help + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")
