"""LoRA adapters between `GPT2ML` and the exported class, against peft's own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.__main__ import main

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")
peft = pytest.importorskip("peft", reason="peft (extra [hf]) is missing")

IDS = torch.tensor([[219, 758, 207, 549, 456, 104]])


def _perturb(model: Any) -> None:
    """An adapter that was trained: its second matrices are not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"k_proj": 2}},
    ],
    ids=["q v", "all", "dora", "ranks"],
)
def test_an_adapter_of_the_exported_class_merges_as_peft_merges_it(
    model: Any, shipped_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options))
    _perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(shipped_model), str(tmp_path / "adapter"), "--out", str(out)]) == 0
    ours, before = GPT2ML.from_pretrained(out), GPT2ML.from_pretrained(shipped_model)
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS), merged(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (ours(IDS) - before(IDS)).abs().max() > 0.1


def test_a_token_embedding_trained_with_the_output_layer_merges(
    model: Any, shipped_model: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.get_input_embeddings().weight.mul_(1.1)
    adapted.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(shipped_model), str(tmp_path / "adapter"), "--out", str(out)]) == 0
    with torch.inference_mode():
        expected = adapted(IDS).logits
        torch.testing.assert_close(GPT2ML.from_pretrained(out)(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    ids=["embedding", "head", "adapted embedding", "adapted head"],
)
def test_an_adapter_of_half_the_tied_matrix_is_refused(
    model: Any,
    shipped_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    """peft trains the embedding and the output layer apart, which one matrix can't hold."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(shipped_model), str(tmp_path / "adapter"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "one matrix for both the token embedding and the output layer" in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_adapter_trained_here_loads_in_peft(
    model: Any, ours: GPT2ML, shipped_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    targets = ["qkv", "blocks.1.mlp.up"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern={"up": 2}, **options
    )
    adapted = peft.get_peft_model(GPT2ML.from_pretrained(shipped_model), config)
    _perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    command = ["export", str(shipped_model), str(tmp_path / "for-peft")]
    assert main([*command, "--adapter", str(tmp_path / "adapter")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "for-peft"]
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "for-peft")
    with torch.inference_mode():
        expected = adapted.merge_and_unload()(IDS)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - ours(IDS)).abs().max() > 0.1


def test_an_adapter_is_exported_as_it_is_or_not_at_all(
    shipped_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = peft.get_peft_model(
        GPT2ML.from_pretrained(shipped_model), peft.LoraConfig(target_modules=["qkv"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    for target, options, message in (
        ("new", ["--dtype", "bfloat16"], "--dtype has no meaning with --adapter; leave it out"),
        ("there", [], "exists already; give another name"),
        ("no/such", [], "is not a folder; create it first"),
    ):
        command = ["export", str(shipped_model), str(tmp_path / target), *options]
        assert main([*command, "--adapter", str(tmp_path / "adapter")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "there"]
