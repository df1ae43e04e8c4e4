"""`gpt2ml finetune` from end to end with every option, and with values that no machine can take."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from gpt2ml_torch import disk
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.commands import finetune as command

# Runs that together give each option once; TEXT and JSON are data, DIR is a folder to write to.
RUNS = {
    "data": "--valid TEXT --valid-limit 3 --separator line --length 16 --overlap 4 --min-tokens 2 "
    "--pack --end-token [SEP] --steps 2 --batch-size 2 --cooldown 1 --schedule constant "
    "--warmup 1 --final-share 0.5 --weight-decay 0.1 --dropout 0.0 --layer-decay 0.9 "
    "--train-layers last:1 --freeze-embeddings --fresh-optimizer --no-compile --upcast "
    "--round-to-nearest --no-gradient-checkpointing --loss-chunk 8 --seed 3 --device cpu",
    "memory": "--valid-share 0 --epochs 0.1 --accumulate 2 --keep-gradients --clip-norm 1 "
    "--precision mixed --optimizer adamw --learning-rate 1e-4 --checkpoint-every 1 "
    "--checkpoint-minutes 1 --keep 1 --on-spike skip --spike-factor 5 --quiet --force",
    "adapter": "--lora-rank 2 --lora-alpha 3 --lora-targets mlp.up,mlp.down --lora-dropout 0.1 "
    "--lora-base int8 --steps 2 --eval-every 1 --patience 2 --prompt 春眠 --sample-every 1 "
    "--sample-tokens 2 --tensorboard --folder DIR",
    "estimate": "--dry-run --memory 100GB",
    "resumed": "--steps 2 --resume",
    "fields of questions": "--prompt-field q --completion-field a --steps 1",
    "a field of texts": "--text-field t --steps 1",
}
# Given in every run.
ALWAYS = {"help", "model", "data", "out", "cache"}


def words_of(name: str, files: Path, folder: Path) -> list[str]:
    """The command line of one of `RUNS`, in a folder of its own."""
    records = folder / "records.jsonl"
    texts = ("夜来", "风雨", "花落")
    lines = [json.dumps({"q": "春眠", "a": text, "t": text}) + "\n" for text in texts]
    records.write_text("".join(lines), encoding="utf-8")
    places = {"TEXT": str(files / "text.txt"), "DIR": str(folder / "run")}
    data = records if "field" in name else files / "text.txt"
    words = ["finetune", str(files / "model.safetensors"), str(data)]
    words += ["--out", str(folder / "out.safetensors"), "--cache", str(folder / "cache")]
    return words + [places.get(word, word) for word in RUNS[name].split()]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_ends_well(
    name: str, tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "adapter":
        pytest.importorskip("peft")
        pytest.importorskip("tensorboard")
    if name == "resumed":
        (tmp_path / "out.run").mkdir()
    assert main(words_of(name, tuning_files, tmp_path)) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").exists() == (name != "estimate")
    assert not list(tmp_path.rglob("*.lock"))


def test_the_runs_give_every_option() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = {word for text in RUNS.values() for word in text.split() if word.startswith("--")}
    missing = [
        action.dest
        for action in parser._actions
        if action.dest not in ALWAYS and not given & set(action.option_strings)
    ]
    assert not missing
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    "options",
    [
        ["--train-layers", "0-99999999999"],
        ["--train-layers", "last:99999999999"],
        ["--train-layers", f"0-{'9' * 5000}"],
        ["--batch-size", "1000000000"],
        ["--batch-size", "9" * 30],
        ["--lora-rank", "1000000000"],
        ["--accumulate", "1000000000", "--keep-gradients"],
        ["--sample-tokens", "1000000000", "--prompt", "春"],
        ["--steps", "9" * 40],
        ["--warmup", "9" * 40],
        ["--length", "1000000000"],
        ["--seed", "9" * 30],
        ["--lora-alpha", "1e400", "--lora-rank", "2"],
        ["--learning-rate", "nan"],
        ["--valid-limit", "-1"],
    ],
    ids=lambda options: "-".join(options)[:40],
)
def test_sizes_beyond_reason_are_one_line_at_once(
    options: list[str], tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(tuning_files / "model.safetensors"), str(tuning_files / "text.txt")]
    out = tmp_path / "out.safetensors"
    assert main([*words, "--out", str(out), "--cache", str(tmp_path / "cache"), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert options[0] in shown
    assert len(shown) < 400
    assert os.listdir(tmp_path) == []


def test_a_second_run_to_the_same_place_is_told_so_in_one_line(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(tuning_files / "model.safetensors"), str(tuning_files / "text.txt")]
    words += ["--out", str(tmp_path / "out.safetensors"), "--steps", "1", "--force"]
    words += ["--cache", str(tmp_path / "cache")]
    folder = tmp_path / "out.run"
    folder.mkdir()
    held = disk.lock(folder / ".lock", "busy")
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"gpt2ml: error: another process is training in {folder}; wait for it to end, or choose "
        "another folder\n"
    )
    disk.unlock(held)
    assert main(words) == 0
