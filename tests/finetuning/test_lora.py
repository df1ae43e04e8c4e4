"""Adapters: saved as peft does, merged, and trained over a packed base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML, GPT2MLConfig, kernels
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import Objective, next_token_rows
from gpt2ml_torch.finetuning.components import pack_blocks
from gpt2ml_torch.finetuning.lora import add_adapter
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers.finetuning_runs import metrics, run

peft = pytest.importorskip("peft")

# The kernels round a packed layer's inputs to int8, by at most 1/254 of the largest in a group:
# 0.7 % of a typical input. PyTorch's own operators, their stand-in, round nothing.
ROUNDED_INPUTS = 0.02


def small_model() -> GPT2ML:
    torch.manual_seed(0)
    config = GPT2MLConfig(
        vocab_size=50,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
    )
    return GPT2ML(config)


def test_an_adapter_is_saved_as_peft_does_and_merges(tuning_files: Path, tmp_path: Path) -> None:
    model = str(tuning_files / "model.safetensors")
    result = run(tuning_files, tmp_path / "adapter", lora_rank=4, precision="float32", dropout=0.0)
    assert result.adapter == tmp_path / "adapter"
    assert result.model is None
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", model, str(tmp_path / "adapter"), "--out", str(merged)]) == 0
    ids = torch.arange(5, 25)[None]
    adapted = peft.PeftModel.from_pretrained(GPT2ML.from_pretrained(model), tmp_path / "adapter")
    found = GPT2ML.from_pretrained(merged)(ids)
    torch.testing.assert_close(found, adapted.get_base_model().eval()(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, GPT2ML.from_pretrained(model)(ids), atol=1e-2)


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_gradients_through_a_packed_layer_are_those_of_the_weight_it_stands_for(base: str) -> None:
    packed = kernels.PackedLinear.pack(nn.Linear(96, 160), precision=base)
    x, towards = torch.randn(7, 96, requires_grad=True), torch.randn(7, 160)
    packed(x).backward(towards)
    torch.testing.assert_close(x.grad, towards @ packed.dequantized(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_adapters_over_a_packed_base_have_the_gradients_of_those_over_plain_weights(
    base: str,
) -> None:
    """Plain weights that are what the packed ones stand for, so that only inputs are rounded."""
    packed = small_model()
    plain = copy.deepcopy(packed)
    pack_blocks(packed, base)
    for name, layer in packed.named_modules():
        if isinstance(layer, kernels.PackedLinear):
            plain.get_parameter(f"{name}.weight").data.copy_(layer.dequantized())
    gradients = [_adapter_gradients(model) for model in (packed, plain)]
    assert len(gradients[1]) == 2 * 4 * 2
    for name, expected in gradients[1].items():
        strayed = (gradients[0][name] - expected).norm() / expected.norm()
        assert strayed < ROUNDED_INPUTS, (name, float(strayed))


def _adapter_gradients(model: GPT2ML) -> dict[str, Tensor]:
    add_adapter(model, rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is 0 at first, and A then has no gradient
            nn.init.normal_(parameter, std=0.1)
    Objective(model)(next_token_rows(torch.randint(1, 50, (2, 30)))).backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_an_adapter_over_a_packed_base_is_merged_into_the_unpacked_file(
    base: str, tuning_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned.safetensors"
    changes: dict[str, Any] = {"lora_rank": 4, "lora_base": base, "end_token": "[SEP]"}
    result = run(tuning_files, out, precision="float32", steps=20, **changes)
    before = ModelFile.open(tuning_files / "model.safetensors").state_dict()
    after, metadata = ModelFile.open(out).state_dict(), ModelFile.open(out)
    assert result.adapter is not None
    adapter = peft.utils.load_peft_weights(str(result.adapter))
    name = "blocks.1.mlp.up"
    prefix = f"base_model.model.{name}"
    delta = adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"] * 2
    torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], delta)
    assert delta.abs().max() > 1e-4
    assert metadata.generation["eos_token_id"] == [3]
    assert metadata.source["finetuned"][0]["lora_rank"] == 4
    evaluations = [row["loss"] for row in metrics(out) if row["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0] - 0.05


def test_the_frozen_matrices_are_packed(tuning_files: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    run(tuning_files, plain, lora_rank=4, steps=1)
    run(tuning_files, packed, lora_rank=4, lora_base="int8", steps=1)
    counts = [
        next(row for row in metrics(path) if row["kind"] == "start") for path in (plain, packed)
    ]
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert counts[0]["weights_here"] - counts[1]["weights_here"] == matrices


@pytest.mark.parametrize("targets", [r".*mlp\.up", r"blocks\.1\.attention\.qkv"])
def test_decoding_over_a_packed_base_sees_an_adapter_on_some_layers(targets: str) -> None:
    """Where all layers are packed, one kernel runs them; where one has an adapter, it must not."""
    model = pack_blocks_of(small_model())
    ids = torch.arange(1, 9)[None]

    def last_logits() -> Tensor:
        cache = KVCache(model.config, batch_size=1, length=8, dtype=model.dtype)
        with torch.no_grad():
            return model(ids, positions=torch.arange(8)[None], cache=cache)[0, -1]

    plain = last_logits()
    peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=3)
    assert (last_logits() - plain).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(last_logits(), model(ids)[0, -1], rtol=0.05, atol=0.05)


def pack_blocks_of(model: GPT2ML) -> GPT2ML:
    pack_blocks(model, "int8")
    return model.eval()


def test_nothing_is_merged_into_packed_weights(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2ML.from_pretrained(tuning_files / "model.safetensors", quantize="int8")
    model.save_pretrained(tmp_path / "int8.safetensors")
    run(tuning_files, tmp_path / "adapter", lora_rank=4, steps=1)
    words = [str(tmp_path / name) for name in ("int8.safetensors", "adapter")]
    assert main(["merge", *words, "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "give the file it was made from" in capsys.readouterr().err
