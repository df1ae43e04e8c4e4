"""`gpt2ml finetune`: what it shows, Ctrl-C, every setting, and bad input as one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.commands.training_bar import TrainingBar
from gpt2ml_torch.finetuning import FinetuneConfig
from tests.helpers.finetuning_runs import metrics


def words_of(files: Path, out: Path, *options: str) -> list[str]:
    """A command line with its data cache beside the files."""
    named = [str(files / "model.safetensors"), str(files / "text.txt"), "--out", str(out)]
    return ["finetune", *named, "--cache", str(files / "cache"), *options]


def test_it_shows_the_data_first_and_then_one_bar_with_all_that_matters(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    options = ["--steps", "6", "--batch-size", "4", "--prompt", "春眠", "--end-token", "[SEP]"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(words_of(tuning_files, out, *options, *cache)) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = captured.err
    for part in (
        "1 file(s), ",
        "tokens a document: ",
        "rows of 32 tokens",
        "[UNK] 0.00%",
        "example: ",
        "[SEP]",
        "validation loss ",
        "bits a character",
        "step 6: 春眠",
        "done: 6 steps, validation loss ",
        f"wrote {out}",
    ):
        assert part in shown, part
    bar = [line for line in shown.replace("\r", "\n").split("\n") if "training:" in line][-1]
    for part in ("loss ", " tokens/s", " GiB", "6/6", "<"):  # "elapsed<left"
        assert part in bar, bar


def test_what_takes_a_moment_needs_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = TrainingBar(quiet=False)
    for done in (0, 50):
        bar.tokenizing("tokenising", done, 100)
    assert capsys.readouterr().err == ""
    time.sleep(1.1)
    bar.tokenizing("tokenising", 75, 100)
    assert "tokenising:  75%" in capsys.readouterr().err
    bar.close()


def test_the_wrong_vocabulary_is_suspected(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("\n\n".join(["春眠不觉晓天地玄黄", "处闻啼鸟宇宙洪荒"]), encoding="utf-8")
    words = [str(tuning_files / "model.safetensors"), str(foreign)]
    options = ["--out", str(tmp_path / "out.safetensors"), "--steps", "1"]
    assert main(["finetune", *words, *options, "--cache", str(tmp_path / "cache")]) == 0
    assert "tokens are [UNK]" in capsys.readouterr().err.replace("%", "")


def test_ctrl_c_saves_and_says_how_to_go_on(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    log = tmp_path / "out.run" / "metrics.jsonl"

    def interrupt() -> None:
        while not (log.exists() and '"kind": "step"' in log.read_text(encoding="utf-8")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    command = words_of(tuning_files, out, "--steps", "5000", "--eval-every", "5000")
    assert main(command) == 130
    watcher.join()
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith("; the same command with --resume goes on")
    step = max(row["step"] for row in metrics(out))
    assert (tmp_path / "out.run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert (tmp_path / "out.run" / "loss.png").exists()
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_broken_loss_names_the_last_good_checkpoint(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2ML.from_pretrained(tuning_files / "model.safetensors")
    with torch.no_grad():
        model.position_embedding.weight[3] = float("nan")
    tokenizer = Tokenizer.from_pretrained(tuning_files / "model.safetensors")
    model.save_pretrained(
        tmp_path / "model.safetensors", tokenizer=tokenizer, allow_non_finite=True
    )
    (tmp_path / "text.txt").write_bytes((tuning_files / "text.txt").read_bytes())
    assert main(words_of(tmp_path, tmp_path / "out.safetensors", "--steps", "3")) == 1
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith(
        "gpt2ml: error: stopped at step 1, the loss is nan; last good checkpoint"
    )


def test_the_command_line_has_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun does
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.to_config(parser.parse_args(words)).batch_size == 3


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
    "packed rows overlap": ["MODEL", "TEXT", "--out", "OUT", "--length", "8", "--overlap", "8"],
    "upcast of float32": [
        "MODEL",
        "TEXT",
        "--out",
        "OUT",
        "--upcast",
        "--precision",
        "float32",
    ],
    "two schedules": ["MODEL", "TEXT", "--out", "OUT", "--cooldown", "5"],
    "nothing long enough": ["MODEL", "TEXT", "--out", "OUT", "--min-tokens", "1000"],
    "nothing to continue": ["MODEL", "TEXT", "--out", "OUT", "--prompt", " "],
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
        status = main(["finetune", *words, "--cache", str(tmp_path / "cache")])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("gpt2ml: error: ")
    assert not (tmp_path / "out.safetensors").exists()
