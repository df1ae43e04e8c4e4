"""Options stated at the fields of a dataclass: checks, names in errors, parsers, help."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from gpt2ml_torch.commands.parsing import Parser, add_options, flags_of, given, parse
from gpt2ml_torch.options import (
    OptionError,
    OptionFileExistsError,
    check_names,
    check_options,
    option,
    resumable_names,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    steps: int = option(10, low=1, high=1000, group="training", help="optimizer steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Base):
    model: str = option(positional=True, path=True, help="a model")
    data: tuple[str, ...] = option((), positional=True, path=True, help="files")
    rate: float | None = option(
        None, above=0, high=1, resumable=True, flags=("--lr", "--rate"), help="of learning"
    )
    share: float = option(0.05, low=0, below=1, default_text="5 %", help="held out")
    mode: Literal["fast", "exact"] = option("fast", help="how to add")
    parts: tuple[str, ...] = option(("a", "b"), choices=("a", "b", "c"), split=",", help="which")
    stop: tuple[str, ...] = option((), help="end the text there")
    ids: tuple[int, ...] = option((), low=0, high=9, flags="--id", help="ids")
    keep: bool = option(True, flags="--drop", inverted=True, help="drop what is read")
    pack: bool = option(False, help="pack rows")
    compile: bool | None = option(None, help="compile")
    pairs: tuple[tuple[int, int], ...] = option((), hidden=True, help="Python only")

    def __post_init__(self) -> None:
        check_options(self)
        if self.stop and self.keep:
            raise OptionError("{stop} is {!r}, which needs {keep=False}", self.stop)


def parsed(*words: str) -> dict[str, Any]:
    parser = Parser(prog="tool")
    add_options(parser, Settings)
    return given(parse(parser, words), Settings)


def test_only_what_was_given_is_there() -> None:
    assert parsed("m") == {"model": "m"}
    words = ["--lr", "0.5", "m", "--stop", "x", "d", "--stop", "y", "--drop", "--no-compile"]
    assert parsed(*words, "e", "--parts", "a,c", "--id", "3", "--pack") == {
        "model": "m",
        "data": ("d", "e"),
        "rate": 0.5,
        "stop": ("x", "y"),
        "keep": False,
        "compile": False,
        "parts": ("a", "c"),
        "ids": (3,),
        "pack": True,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps is 1001; expected a whole number from 1 to 1000"),
        ({"steps": True}, "steps is True; expected a whole number from 1 to 1000"),
        ({"steps": 2.0}, "steps is 2.0; expected a whole number from 1 to 1000"),
        ({"steps": None}, "steps is None; expected a whole number from 1 to 1000"),
        ({"rate": 0}, "rate is 0; expected a number above 0 and up to 1"),
        ({"rate": float("nan")}, "rate is nan; expected a number above 0 and up to 1"),
        ({"rate": "1"}, "rate is '1'; expected a number above 0 and up to 1"),
        ({"share": 1.0}, "share is 1.0; expected a number from 0 and below 1"),
        ({"mode": "slow"}, "mode is 'slow'; expected one of fast, exact"),
        ({"parts": ("a", "d")}, "parts holds 'd'; expected some of a, b, c"),
        ({"stop": "x"}, "stop is 'x'; expected strings"),
        ({"ids": (1, 10)}, "ids holds 10; expected whole numbers from 0 to 9"),
        ({"pack": 1}, "pack is 1; expected True or False"),
        ({"model": 3}, "model is 3; expected a string"),
        ({"stop": ("a\udcff",)}, "stop is 'a\\udcff', which isn't UTF-8 at character 2"),
    ],
)
def test_a_value_out_of_range_names_its_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Settings(**{"model": "m", **values})
    assert message in str(caught.value)


def test_values_at_the_ends_of_their_ranges_are_allowed() -> None:
    for values in ({"steps": 1}, {"steps": 1000}, {"rate": 1}, {"rate": None}, {"share": 0}):
        Settings(model="m", **values)
    Settings(model=Path("a"), data=("\udcff",))  # type: ignore[arg-type]  # any path


def test_an_error_has_fields_for_python_and_flags_for_the_command_line() -> None:
    parser = Parser(prog="tool")
    add_options(parser, Settings)
    with pytest.raises(OptionError) as caught:
        Settings(model="m", stop=("{rate}",))
    assert str(caught.value) == "stop is ('{rate}',), which needs keep=False"
    shown = caught.value.render(flags_of(parser))
    assert shown == "--stop is ('{rate}',), which needs --drop"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for template, expected in {
        "{rate=0.5}": "--lr 0.5",
        "{pack=True}": "--pack",
        "{compile=False}": "--no-compile",
        "{model}": "MODEL",
        "{unknown}": "unknown",
    }.items():
        assert OptionError(template).render(flags_of(parser)) == expected
    in_the_way = OptionFileExistsError("{} exists; {pack=True}", "x")
    assert isinstance(in_the_way, FileExistsError)
    assert str(in_the_way) == "x exists; pack=True"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--stpes", "3"], "unknown option --stpes; did you mean --steps?"),
        (["m", "--paak"], "did you mean --pack?"),
        (["m", "-春"], "goes behind --"),
        (["m", "--steps", "many"], "'many' is not a whole number"),
        (["m", "--lr", "x"], "'x' is not a number"),
        (["m", "--mode", "slow"], "invalid choice: 'slow'"),
        ([], "MODEL"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parsed(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_begins_with_a_dash_goes_behind_two() -> None:
    assert parsed("m", "--steps", "3", "--", "-春")["data"] == ("-春",)


def test_help_has_each_option_its_default_and_its_group() -> None:
    parser = Parser(prog="tool")
    add_options(parser, Settings, without=("compile",))
    text = " ".join(parser.format_help().split())
    for part in (
        "optimizer steps (default: 10)",
        "held out (default: 5 %)",
        "end the text there (repeatable)",
        "which (default: a,b)",
        "--lr",
        "training:",
    ):
        assert part in text
    for absent in ("Python only", "--compile", "==SUPPRESS=="):
        assert absent not in text


def test_unknown_names_get_the_nearest() -> None:
    check_names(Settings, ["steps"])
    with pytest.raises(ValueError, match=r"unknown setting 'stepz'; did you mean steps\?"):
        check_names(Settings, ["stepz"], "setting")
    with pytest.raises(ValueError, match="known are steps, model"):
        check_names(Settings, ["xxxxxxxx"])


def test_what_a_resumed_run_may_change_is_marked() -> None:
    assert resumable_names(Settings) == {"rate"}


def test_options_need_no_third_party_package() -> None:
    code = (
        "import sys, gpt2ml_torch.options, gpt2ml_torch.commands.parsing;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
