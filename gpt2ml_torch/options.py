"""Options, each stated once: at the field of the dataclass that holds it.

The field gives the default, the range, the help, the flag, and whether a resumed run may change
it; parser, `--help`, checks and suggestions for mistyped names come from there:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        steps: int = option(10, low=1, group="training", help="optimizer steps")
        rate: float | None = option(None, above=0, high=1, resumable=True, help="learning rate",
                                    default_text="1e-5, LoRA: 1e-4", flags=("--rate", "--lr"))
        mode: Literal["fast", "exact"] = option("fast", help="how to add")
        stop: tuple[str, ...] = option((), help="end the text after this string")
        keep: bool = option(True, flags="--drop", inverted=True, help="drop what is read")

        def __post_init__(self) -> None:
            check_options(self)              # ValueError: "steps is 0; expected ..."
            if self.keep and self.stop:
                raise OptionError("{stop} is {!r}, which needs {keep=False}", self.stop)

In an error's template `{name}` is an option's name and `{name=value}` one of its settings. Python
callers read `stop` and `keep=False`; a command line reads `--stop` and `--drop`. Its parser is made
from the same fields by `gpt2ml_torch.commands.parsing`. This module imports no third-party package.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import math
import os
import string
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

Namer = Callable[[str, "str | None"], str]  # (field, value or None) -> the name shown to the user

_KEY = "option"  # in the metadata of a field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """The metadata of an option's field; `option` explains each."""

    help: str
    low: float | None
    high: float | None
    above: float | None
    below: float | None
    choices: tuple[str, ...]
    metavar: str | None
    flags: tuple[str, ...]
    group: str
    default_text: str | None
    resumable: bool
    inverted: bool
    positional: bool
    hidden: bool
    split: str | None
    path: bool


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    flags: str | Sequence[str] = (),
    group: str = "options",
    default_text: str | None = None,
    resumable: bool = False,
    inverted: bool = False,
    positional: bool = False,
    hidden: bool = False,
    split: str | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field that is an option; without a default it is required.

    low, high: inclusive bounds of a number, or of each item; above, below: exclusive bounds.
    choices: the allowed strings; a field typed `Literal` gets them from its type.
    flags: names on the command line, the preferred one first, if not `--the-field`.
    default_text: the default in --help, if the value (such as None) says too little.
    resumable: a run that is resumed may change it.
    inverted: the flag of a boolean turns it off. positional: an argument without a flag.
    hidden: Python only. split: the separator of the items of a tuple given in one word.
    path: a file name, in which bytes that aren't UTF-8 are allowed.
    """
    flags = (flags,) if isinstance(flags, str) else tuple(flags)
    described = Option(
        **{name: value for name, value in locals().items() if name not in ("default", "choices")},
        choices=tuple(choices),
    )
    return dataclasses.field(default=default, metadata={_KEY: described})


class _NamingError(Exception):
    """An error whose text names options; see the module's docstring for the template."""

    def __init__(self, template: str, *values: object) -> None:
        self.template, self.values = template, values
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.template, *self.values)

    def __str__(self) -> str:
        return self.render()

    def render(self, namer: Namer | None = None) -> str:
        """The text with the options under the names that `namer` gives them."""
        return _Template(namer or python_name).vformat(self.template, self.values, {})


class OptionError(_NamingError, ValueError):
    """A value, or a combination of values, that makes no sense."""


class OptionFileExistsError(_NamingError, FileExistsError):
    """A file exists already; an option allows to replace it."""

    errno = errno.EEXIST


class _Template(string.Formatter):
    def __init__(self, namer: Namer) -> None:
        self._namer = namer

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if field_name.isdigit():
            return args[int(field_name)], field_name
        name, equals, value = field_name.partition("=")
        return self._namer(name, value if equals else None), field_name


def python_name(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field that is an option, with its type analysed.

    `tuple[int, ...] | None` has the kind int and is many and optional. `kind` is None for a type
    that can't be given on the command line.
    """

    name: str
    kind: type | None
    many: bool
    optional: bool
    default: Any
    choices: tuple[str, ...]
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """Its names on the command line; none for a positional or hidden argument."""
        if self.option.positional or self.option.hidden:
            return ()
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    def allows(self, value: object) -> bool:
        """Whether `value`, or each item of a tuple, has the right type and is in the range."""
        if value is None:
            return self.optional
        if not self.many:
            return self.allows_one(value)
        return isinstance(value, tuple) and all(map(self.allows_one, value))

    def allows_one(self, value: object) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is None:
            return True
        if self.kind in (int, float):
            return self._in_range(value)
        if self.kind is str and self.option.path:
            return isinstance(value, (str, os.PathLike))
        return isinstance(value, self.kind)

    def _in_range(self, value: object) -> bool:
        types_allowed = (int,) if self.kind is int else (int, float)
        if type(value) not in types_allowed:
            return False
        number = typing.cast(float, value)
        limits = self.option
        return (
            (type(number) is int or math.isfinite(number))
            and (limits.low is None or number >= limits.low)
            and (limits.above is None or number > limits.above)
            and (limits.high is None or number <= limits.high)
            and (limits.below is None or number < limits.below)
        )

    def expectation(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return f"{'some' if self.many else 'one'} of {', '.join(self.choices)}"
        if self.kind in (int, float):
            noun = "whole number" if self.kind is int else "number"
            noun = f"{noun}s" if self.many else f"a {noun}"
            return " ".join(filter(None, (noun, self._range())))
        if self.kind is bool:
            return "True or False"
        return "strings" if self.many else "a string"

    def _range(self) -> str:
        limits = self.option
        low = f"above {limits.above:g}" if limits.above is not None else ""
        low = f"from {limits.low:.10g}" if limits.low is not None else low
        high = f"below {limits.below:g}" if limits.below is not None else ""
        if limits.high is not None:
            high = f"{'to' if low.startswith('from') else 'up to'} {limits.high:.10g}"
        joint = " and " if low and high and not high.startswith("to") else " "
        return (low + joint + high).strip()


@functools.cache
def option_fields(cls: type) -> tuple[OptionField, ...]:
    """The options of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return tuple(
        _option_field(field, hints[field.name]) for field in fields if _KEY in field.metadata
    )


def _option_field(field: dataclasses.Field[Any], hint: Any) -> OptionField:
    described: Option = field.metadata[_KEY]
    hint, optional = _without_none(hint)
    many = typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,)
    if many:
        hint = typing.get_args(hint)[0]
    literal = typing.get_origin(hint) is Literal
    return OptionField(
        name=field.name,
        kind=str
        if literal or described.path
        else hint
        if hint in (str, int, float, bool)
        else None,
        many=many,
        optional=optional,
        default=field.default,
        choices=typing.get_args(hint) if literal else described.choices,
        option=described,
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    rest = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(hint))


def check_options(instance: Any) -> None:
    """Raise `OptionError`, naming the field, for the first value of the wrong type or range."""
    cls: Any = type(instance)
    for field in option_fields(cls):
        value = getattr(instance, field.name)
        if not field.allows(value):
            verb = "is"
            if field.many and isinstance(value, tuple):
                verb, value = "holds", next(item for item in value if not field.allows_one(item))
            template = "{" + field.name + "} " + verb + " {!r}; expected {}"
            raise OptionError(template, value, field.expectation())
        if field.kind is str and not field.option.path:
            for text in value if field.many else (value,):
                check_text(field.name, text)


def check_text(name: str, text: str | None) -> None:
    """Raise `OptionError` for a text with bytes that aren't UTF-8 (lone surrogates in Python)."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            "{" + name + "} is {}, which isn't UTF-8 at character {}; give it in UTF-8",
            ascii(text),
            error.start + 1,
        ) from None


def check_names(cls: type, names: Iterable[str], what: str = "option") -> None:
    """Raise `ValueError`, with the most similar name, for a name that isn't a field."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            hint = suggestion(str(name), known) or f"known are {', '.join(known)}"
            raise ValueError(f"unknown {what} {name!r}; {hint}")


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """ "did you mean X?" for a mistyped name, or None if no name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def resumable_names(cls: type) -> frozenset[str]:
    """The fields that a resumed run may change."""
    return frozenset(field.name for field in option_fields(cls) if field.option.resumable)
