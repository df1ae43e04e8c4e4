"""Whole fine-tunings of a tiny model: results, resuming, kills, errors, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig, checkpoint
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder
from gpt2ml_torch.finetuning.config import FinetuneConfig, TrainConfig, parse_layers
from gpt2ml_torch.finetuning.reporting import Event, read_metrics
from gpt2ml_torch.finetuning.run import finetune
from gpt2ml_torch.finetuning.spikes import LossWatch

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = list(
    dict.fromkeys("春眠不觉晓处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望低思故乡")
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors and text.txt."""
    folder = tmp_path_factory.mktemp("finetuning")
    vocab = SPECIAL + CHARACTERS
    config = GPT2MLConfig(
        vocab_size=len(vocab) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    checkpoint.save(
        folder / "model.safetensors",
        GPT2ML(config).state_dict(),
        config,
        vocab="\n".join(vocab) + "\n",
        source={"name": "tiny"},
    )
    draw = random.Random(0)
    texts = ["".join(draw.choices(CHARACTERS[:12], k=draw.randint(8, 60))) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def settings(files: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": str(files / "model.safetensors"),
        "data": (str(files / "text.txt"),),
        "out": str(out),
        "cache": str(files / "cache"),
        "learning_rate": 1e-2,
        "batch_size": 4,
        "steps": 12,
        "eval_every": 4,
        "valid_share": 0.1,
    }
    return values | changes


def run(files: Path, out: Path, stop_after: int | None = None, **changes: Any) -> Any:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    return finetune(FinetuneConfig(**settings(files, out, **changes)), should_stop=should_stop)


def losses(out: Path) -> list[float]:
    rows = read_metrics(out.with_suffix(".run") / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] in ("step", "eval")]


def test_the_result_is_one_file_that_knows_where_it_comes_from(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run(files, out, end_token="[SEP]", steps=30)
    metadata = checkpoint.read_metadata(out)
    assert metadata.source["finetuned"][0]["data"] == ["text.txt"]
    assert metadata.source["name"] == "tiny"
    assert metadata.generation["eos_token_id"] == [3]
    assert metadata.dtype == torch.bfloat16
    assert metadata.vocab == checkpoint.read_metadata(files / "model.safetensors").vocab
    rows = read_metrics(tmp_path / "out.run" / "metrics.jsonl")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.5
    assert evaluations[-1]["bits_per_character"] > 0
    assert result.best_loss == min(row["loss"] for row in evaluations)
    assert CheckpointFolder(tmp_path / "out.run" / "checkpoints").steps() == [28, 30]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "float32", "optimizer": "adamw", "pack": True},
        {
            "precision": "mixed",
            "step_in_backward": False,
            "accumulate": 2,
            "clip_norm": 1.0,
            "layer_decay": 0.9,
        },
        {"optimizer": "adamw8bit", "train_layers": "last:1", "freeze_embeddings": True},
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_base": "int8", "lora_dropout": 0.1},
    ],
    ids=["bfloat16", "float32", "mixed", "8bit", "lora", "lora-int8"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    files: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if changes.get("lora_rank"):
        pytest.importorskip("peft")
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("torchao")
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    run(files, whole, **changes)
    stopped = run(files, parts, stop_after=5, **changes)
    assert (stopped.reason, stopped.step, stopped.model) == ("interrupted", 5, None)
    assert not parts.exists()
    run(files, parts, resume=True, **changes)
    assert len(losses(whole)) == 12 + 4
    assert losses(parts) == losses(whole)
    expected, found = checkpoint.load_tensors(whole), checkpoint.load_tensors(parts)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_ten_kills_lose_nothing(files: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    changes = {"steps": 60, "eval_every": 10, "checkpoint_every": 3}
    text = json.dumps(settings(files, out, **changes))
    ended = worker("kill", text, "10", "7", timeout=110)
    assert ended.returncode == 0, ended.stderr
    run(files, whole, **changes)
    assert losses(out) == losses(whole)
    assert out.read_bytes() != b""
    expected, found = checkpoint.load_tensors(whole), checkpoint.load_tensors(out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def worker(*arguments: str, processes: int = 1, timeout: float = 100) -> Any:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "tests.finetuning_worker",
    ]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_two_processes_have_the_losses_of_one_and_one_can_go_on(
    files: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"precision": "float32", "dropout": 0.0, "steps": 8}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    ended = worker("run", json.dumps(settings(files, two, **changes)), "5", processes=2)
    assert ended.returncode == 0, ended.stderr
    run(files, one, **changes)
    run(files, two, resume=True, **changes)
    found, expected = losses(two), losses(one)
    assert found == pytest.approx(expected, rel=2e-5)
    start, alone = (
        next(
            row
            for row in read_metrics(path.with_suffix(".run") / "metrics.jsonl")
            if row["kind"] == "start"
        )
        for path in (two, one)
    )
    assert start["weights_here"] == pytest.approx(alone["weights_here"] / 2, rel=0.05)
    # Adafactor's statistics of rows are divided, those of columns are whole in each process.
    assert start["slots_here"] < 0.7 * alone["slots_here"]


def test_a_spike_stops_with_the_last_good_checkpoint_or_is_skipped(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trouble(watch: LossWatch, loss: float) -> str | None:
        count = int(watch.state()[2])
        return "the loss is nan" if count == 6 and not skipped else None

    skipped: list[bool] = []
    monkeypatch.setattr(LossWatch, "trouble", trouble)
    stopped = run(files, tmp_path / "stop.safetensors", stop_after=None)
    assert (stopped.reason, stopped.step, stopped.trouble) == ("spike", 6, "the loss is nan")
    assert stopped.last_checkpoint == tmp_path / "stop.run" / "checkpoints" / "step-00000004"

    def once(event: Event) -> None:
        if event.kind == "skip":
            skipped.append(True)

    config = FinetuneConfig(**settings(files, tmp_path / "skip.safetensors", on_spike="skip"))
    assert finetune(config, callback=once).reason == "done"
    assert skipped == [True]


def test_a_watch_tells_spikes_from_noise() -> None:
    watch = LossWatch(factor=6.0)
    draw = random.Random(0)
    for _ in range(200):
        loss = draw.gauss(3.0, 0.3)
        assert watch.trouble(loss) is None
        watch.add(loss)
    assert watch.trouble(9.0) is not None
    assert watch.trouble(float("nan")) == "the loss is nan"


def test_a_full_disk_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from gpt2ml_torch.finetuning import checkpoints

    folder = CheckpointFolder(tmp_path / "checkpoints")
    first = folder.save(1, {"a": torch.arange(4)}, {"best_step": None})

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write_tensors", fail)
    with pytest.raises(OSError, match=r"can't write the checkpoint .*step-00000002.*No space left"):
        folder.save(2, {"a": torch.arange(4)}, {"best_step": None})
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [first.name]


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 7):
        folder.save(step, {"a": torch.zeros(1)}, {"best_step": 2})
    assert folder.steps() == [2, 5, 6]


def test_lora_is_saved_as_peft_does_and_merges(files: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = str(files / "model.safetensors")
    result = run(files, tmp_path / "adapter", lora_rank=4, precision="float32", dropout=0.0)
    assert result.adapter == tmp_path / "adapter"
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", model, str(tmp_path / "adapter"), "--out", str(merged)]) == 0
    ids = torch.arange(5, 25)[None]
    adapted = peft.PeftModel.from_pretrained(GPT2ML.from_pretrained(model), tmp_path / "adapter")
    found = GPT2ML.from_pretrained(merged)(ids)
    torch.testing.assert_close(found, adapted.get_base_model().eval()(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, GPT2ML.from_pretrained(model)(ids), atol=1e-2)


def test_schedules_warm_up_and_end_where_they_should() -> None:
    for schedule, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        config = TrainConfig(schedule=schedule, learning_rate=1.0, warmup=10)
        rates = [config.learning_rate_at(step, 110) for step in range(110)]
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(rates) == 1.0
        assert rates[-1] == pytest.approx(end, abs=0.02)


def test_layers_are_named_in_several_ways() -> None:
    assert parse_layers("last:2", 6) == {4, 5}
    assert parse_layers("first:1,3-4", 6) == {0, 3, 4}
    for text in ("", "9", "last:7", "a-b", "4-2", "-1"):
        with pytest.raises(ValueError, match="train_layers"):
            parse_layers(text, 6)


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
    arguments: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01\n")
    places = {
        "MODEL": files / "model.safetensors",
        "TEXT": files / "text.txt",
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


def test_resuming_with_other_settings_is_refused(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run(files, out, stop_after=5)
    with pytest.raises(ValueError, match=r"learning_rate 0\.01, now it is 0\.02"):
        run(files, out, resume=True, learning_rate=2e-2)
    other = tmp_path / "other.txt"
    other.write_text((files / "text.txt").read_text("utf-8") + "\n\n春眠不觉晓处处闻啼鸟", "utf-8")
    with pytest.raises(ValueError, match="other data"):
        run(files, out, resume=True, data=(str(other),))
    with pytest.raises(OSError, match="--resume"):
        run(files, out)


def test_the_command_line_has_every_setting() -> None:
    import argparse

    from gpt2ml_torch.commands import finetune as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    config = command.to_config(parser.parse_args(["m", "d", "--out", "o.safetensors"]))
    assert config == FinetuneConfig(model="m", data=("d",), out="o.safetensors")
    names = {action.dest for action in parser._actions}
    missing = {field.name for field in dataclasses.fields(FinetuneConfig)} - names
    assert not missing


def test_a_dry_run_names_the_kinds_and_suggests_what_would_fit(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt2ml_torch.finetuning.prediction import predict, suggestion

    out = tmp_path / "out.safetensors"
    words = [str(files / "model.safetensors"), str(files / "text.txt"), "--out", str(out)]
    assert main(["finetune", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for kind in ("weights", "gradients", "optimizer", "activations", "total"):
        assert kind in shown
    assert not out.with_suffix(".run").exists()
    sizes = GPT2MLConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    large = {"optimizer": "adamw", "step_in_backward": False, "precision": "float32"}
    config = FinetuneConfig(**settings(files, out, **large))
    heavy = predict(config, sizes)
    assert heavy.weights == 4 * sizes.num_parameters
    assert 8 * sizes.num_parameters < heavy.optimizer < 8 * sizes.num_parameters + 2**24
    light = predict(dataclasses.replace(config, step_in_backward=True), sizes)
    assert light.gradients < heavy.gradients / 4
    assert "inside the backward pass" in suggestion(config, light.total, sizes)
    assert "no setting here would" in suggestion(config, 1000, sizes)
