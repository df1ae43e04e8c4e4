"""What a conversion can be told: fields for Python, flags on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import convert.__main__
import gpt2ml_torch.__main__
from convert.inputs import locate
from convert.plan import Options
from convert.to_safetensors import convert as to_safetensors
from tests.helpers import checkpoint_factory as factory


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int3"}, "dtype is 'int3'; expected one of float32, bfloat16, float16, int8"),
        ({"overwrite": 1}, "overwrite is 1; expected True or False"),
        ({"vocab": Path("a"), "with_vocab": False}, "with_vocab=False excludes vocab"),
        ({"keep_optimizer": True, "dtype": "int8"}, "keep_optimizer=True excludes dtype=int8"),
    ],
)
def test_values_that_make_no_sense_name_their_fields(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_an_error_of_a_conversion_names_fields_too(tmp_path: Path) -> None:
    folder = factory.write_folder(tmp_path / "ckpt")
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="give vocab, or convert without it by with_vocab=False"):
        to_safetensors(locate(folder), tmp_path / "out", Options())


def test_help_calls_the_program_as_the_user_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpt2ml_torch.__main__.main(["convert", "--help"]) == 0
    assert "python -m" not in capsys.readouterr().out
    assert convert.__main__.main(["--help"]) == 0
    assert "  python -m convert ckpt_dir out" in capsys.readouterr().out
