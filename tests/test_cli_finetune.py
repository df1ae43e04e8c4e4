"""`gpt2ml finetune`: every setting, and bad input as one line with status 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import FinetuneConfig


def test_the_command_line_has_every_setting() -> None:
    import argparse

    from gpt2ml_torch.commands import finetune as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["m", "d", "--out", "o.safetensors", "--device", "cpu"]
    config = command.to_config(parser.parse_args(words))
    assert config == FinetuneConfig(model="m", data=("d",), out="o.safetensors")
    names = {action.dest for action in parser._actions}
    missing = {field.name for field in dataclasses.fields(FinetuneConfig)} - names
    assert not missing


BAD = {
    "no model": ["missing.safetensors", "TEXT", "--out", "OUT"],
    "not a model": ["TEXT", "TEXT", "--out", "OUT"],
    "no data": ["MODEL", "missing.txt", "--out", "OUT"],
    "no out": ["MODEL", "TEXT"],
    "out in no folder": ["MODEL", "TEXT", "--out", "nowhere/out.safetensors"],
    "out is the model": ["MODEL", "TEXT", "--out", "MODEL"],
    "out with another ending": ["MODEL", "TEXT", "--out", "OUT.bin"],
    "nothing to resume": ["MODEL", "TEXT", "--out", "OUT", "--resume"],
    "accumulation in backward": ["MODEL", "TEXT", "--out", "OUT", "--accumulate", "2"],
    "clipping in backward": ["MODEL", "TEXT", "--out", "OUT", "--clip-norm", "1"],
    "int8 without adapter": ["MODEL", "TEXT", "--out", "OUT", "--lora-base", "int8"],
    "layers of an adapter": [
        "MODEL",
        "TEXT",
        "--out",
        "OUT",
        "--lora-rank",
        "2",
        "--train-layers",
        "1",
    ],
    "no such target": ["MODEL", "TEXT", "--out", "OUT", "--lora-targets", "c_attn"],
    "no such layer": ["MODEL", "TEXT", "--out", "OUT", "--train-layers", "5"],
    "no such optimizer": ["MODEL", "TEXT", "--out", "OUT", "--optimizer", "sgd"],
    "not a number": ["MODEL", "TEXT", "--out", "OUT", "--lr", "fast"],
    "negative rate": ["MODEL", "TEXT", "--out", "OUT", "--lr", "-1"],
    "no rows": ["MODEL", "TEXT", "--out", "OUT", "--batch-size", "0"],
    "too long": ["MODEL", "TEXT", "--out", "OUT", "--length", "64"],
    "no such end token": ["MODEL", "TEXT", "--out", "OUT", "--end-token", "[EOS]"],
    "bad text": ["MODEL", "BINARY", "--out", "OUT"],
    "bad memory": ["MODEL", "TEXT", "--out", "OUT", "--dry-run", "--memory", "much"],
    "memory without dry run": ["MODEL", "TEXT", "--out", "OUT", "--memory", "22GB"],
    "no such device": ["MODEL", "TEXT", "--out", "OUT", "--device", "tpu"],
    "all for validation": ["MODEL", "TEXT", "--out", "OUT", "--valid-share", "1"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01\n")
    places = {
        "MODEL": tuning_files / "model.safetensors",
        "TEXT": tuning_files / "text.txt",
        "BINARY": tmp_path / "binary.txt",
        "OUT": tmp_path / "out.safetensors",
        "OUT.bin": tmp_path / "out.bin",
    }
    words = [str(places.get(word, word)) for word in arguments]
    try:
        status = main(["finetune", *words, "--cache", str(tmp_path / "cache"), "--quiet"])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("gpt2ml: error: ")
    assert not (tmp_path / "out.safetensors").exists()
