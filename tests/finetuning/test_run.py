"""Whole fine-tunings of a tiny model: what comes out, and what can be seen on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.__main__ import main as convert
from gpt2ml_torch import GPT2ML, Generator, Tokenizer
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import (
    Event,
    FinetuneConfig,
    Objective,
    PromptContinued,
    finetune,
    upcasting,
)
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder
from gpt2ml_torch.finetuning.components import load_data, load_model, make_optimizer
from gpt2ml_torch.finetuning.data.batches import evaluation_batches
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers.finetuning_runs import metrics, run, settings


def test_the_result_is_one_file_that_knows_where_it_comes_from(
    tuning_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = run(tuning_files, out, end_token="[SEP]", steps=30)
    metadata = ModelFile.open(out)
    assert metadata.source["finetuned"][0]["data"] == ["text.txt"]
    assert metadata.source["name"] == "tiny"
    assert metadata.generation["eos_token_id"] == [3]
    assert metadata.dtype == "bfloat16"
    assert metadata.vocab == ModelFile.open(tuning_files / "model.safetensors").vocab
    evaluations = [row for row in metrics(out) if row["kind"] == "eval"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.5
    assert evaluations[-1]["bits_per_character"] > 0
    assert result.best_loss == min(row["loss"] for row in evaluations)
    assert CheckpointFolder(tmp_path / "out.run" / "checkpoints").steps() == [28, 30]

    again = tmp_path / "again.safetensors"
    values = settings(tuning_files, again, steps=1) | {"model": str(out)}
    finetune(FinetuneConfig(**values))
    history = ModelFile.open(again).source["finetuned"]
    assert [entry["from"] for entry in history] == ["model.safetensors", "out.safetensors"]
    assert ModelFile.open(again).generation["eos_token_id"] == [3]


def test_a_model_that_learned_an_end_token_stops_there(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("\n".join(["春眠不觉晓", "处闻啼鸟"] * 20), encoding="utf-8")
    out = tmp_path / "out.safetensors"
    changes: dict[str, Any] = {
        "separator": "line",
        "valid_share": 0.0,
        "steps": 60,
        "end_token": "[SEP]",
    }
    run(tuning_files, out, data=(str(text),), **changes)
    generator = Generator(
        GPT2ML.from_pretrained(out), Tokenizer.from_pretrained(out), compile=False
    )
    assert generator.generate("春眠", max_new_tokens=25, top_k=1) == ["春眠不觉晓"]
    command = ["generate", str(out), "处闻", "--max-new-tokens", "25", "--top-k", "1"]
    assert main([*command, "--no-compile"]) == 0
    assert capsys.readouterr().out.strip() == "处闻啼鸟"


def test_the_tuned_file_goes_back_to_the_original_code(tuning_files: Path, tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    out, folder = tmp_path / "out.safetensors", tmp_path / "tf"
    run(tuning_files, out, steps=2)
    assert convert(["--to-tf", str(out), str(folder)]) == 0
    reader = tf.train.load_checkpoint(str(folder))
    tuned = ModelFile.open(out).state_dict()["blocks.1.mlp.up.weight"].float().numpy()
    np.testing.assert_array_equal(reader.get_tensor("newslm/layer01/intermediate/kernel"), tuned.T)


def test_the_best_weights_are_written_not_the_last(tuning_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    overfitting: dict[str, Any] = {
        "precision": "float32",
        "optimizer": "adamw",
        "dropout": 0.0,
        "steps": 100,
    }
    result = run(tuning_files, out, eval_every=10, keep=1, **overfitting)
    assert result.best_step not in (None, 0, 100)
    config = FinetuneConfig(**settings(tuning_files, out))
    rows = load_data(config, Tokenizer.from_pretrained(out), ModelFile.open(out).config).valid
    assert rows is not None
    model = GPT2ML.from_pretrained(out)
    batches = list(evaluation_batches(rows, batch_size=4))
    with torch.no_grad():
        total = sum(float(Objective(model)(batch)) for batch in batches)
    learned = sum(int((batch.labels != 0).sum()) for batch in batches)
    assert total / learned == pytest.approx(result.best_loss, rel=1e-4)


def test_frozen_weights_stay_as_they_are(tuning_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run(
        tuning_files,
        out,
        precision="float32",
        train_layers="last:1",
        freeze_embeddings=True,
        steps=3,
    )
    before = ModelFile.open(tuning_files / "model.safetensors").state_dict()
    after = ModelFile.open(out).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if name.startswith("blocks.1.")}


def test_lower_layers_learn_more_slowly_with_layer_decay(
    tuning_files: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig(**settings(tuning_files, tmp_path / "o.safetensors", layer_decay=0.5))
    model, _ = load_model(config, ModelFile.open(config.model))
    scales = {
        id(parameter): group["scale"]
        for group in make_optimizer(Objective(model), config).param_groups
        for parameter in group["params"]
    }
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["blocks.1.mlp.up.weight"] == 1.0
    assert found["blocks.0.mlp.up.weight"] == 0.5
    assert found["token_embedding.weight"] == found["embedding_norm.bias"] == 0.25


def test_validation_is_split_by_document_and_fixed_by_the_seed(
    tuning_files: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(tuning_files / "model.safetensors")
    sizes = ModelFile.open(tuning_files / "model.safetensors").config
    config = FinetuneConfig(**settings(tuning_files, tmp_path / "o.safetensors", valid_share=0.2))
    held_out = []
    for seed in (0, 0, 1):
        data = load_data(dataclasses.replace(config, seed=seed), tokenizer, sizes)
        assert data.valid is not None
        assert not set(data.train.documents) & set(data.valid.documents)
        assert len(data.train.documents) + len(data.valid.documents) == 60
        held_out.append(set(data.valid.documents.tolist()))
    assert held_out[0] == held_out[1] != held_out[2]
    other = tmp_path / "other.txt"
    other.write_text("春眠不觉晓处闻啼鸟\n\n夜来风雨声花落知多少", encoding="utf-8")
    data = load_data(dataclasses.replace(config, valid=(str(other),)), tokenizer, sizes)
    assert data.valid is not None
    assert (len(data.train.documents), len(data.valid.documents)) == (60, 2)


def test_one_sees_the_model_change_and_the_library_prints_nothing(
    tuning_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    changes = {"prompts": ("春眠", "处"), "sample_tokens": 6, "tensorboard": True, "steps": 8}
    config = FinetuneConfig(**settings(tuning_files, tmp_path / "out.safetensors", **changes))
    finetune(config, callback=events.append)
    samples = [(e.step, e.prompt) for e in events if isinstance(e, PromptContinued)]
    assert samples == [(4, "春眠"), (4, "处"), (8, "春眠"), (8, "处")]
    texts = [e.text for e in events if isinstance(e, PromptContinued)]
    assert all(texts)
    assert texts[0] != texts[2]
    kinds = {"start", "eval", "step", "sample", "checkpoint", "end"}
    assert {event.kind for event in events} == kinds
    assert list((tmp_path / "out.run" / "tensorboard").glob("events.*"))
    assert (tmp_path / "out.run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr() == ("", "")


def test_a_cpu_that_is_slow_in_mixed_precision_is_told_of(
    tuning_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for features, told in (({"avx2"}, True), ({"avx2", "amx_bf16"}, False)):
        monkeypatch.setattr(upcasting, "cpu_features", lambda found=features: frozenset(found))
        caplog.clear()
        run(tuning_files, tmp_path / f"{told}.safetensors", precision="mixed", steps=1)
        assert ("float32 is faster than mixed" in caplog.text) == told


def test_compiled_blocks_learn_the_same(tuning_files: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"precision": "float32", "dropout": 0.0, "steps": 3}
    plain = run(tuning_files, tmp_path / "plain.safetensors", **changes)
    compiled = run(tuning_files, tmp_path / "compiled.safetensors", compile=True, **changes)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_packed_model_is_refused(tuning_files: Path, tmp_path: Path) -> None:
    packed = tmp_path / "int8.safetensors"
    model = GPT2ML.from_pretrained(tuning_files / "model.safetensors", quantize="int8")
    tokenizer = Tokenizer.from_pretrained(tuning_files / "model.safetensors")
    model.save_pretrained(packed, tokenizer=tokenizer)
    values = settings(tuning_files, tmp_path / "out.safetensors") | {"model": str(packed)}
    with pytest.raises(ValueError, match="holds int8 weights, which can't be trained"):
        finetune(FinetuneConfig(**values))
