"""`gpt2ml export`: what stands on its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2ml_torch.__main__ import main


@pytest.mark.parametrize(
    ("flags", "named"), [(["--dtype", "bfloat16"], "--dtype"), (["--force"], "--force")]
)
def test_options_of_the_model_are_refused_beside_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    words = ["export", "model.safetensors", str(tmp_path / "out"), "--adapter", "adapter", *flags]
    assert main(words) == 2
    assert f"{named} has no meaning with --adapter; leave it out" in capsys.readouterr().err
