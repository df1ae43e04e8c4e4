"""The class for transformers against `GPT2ML`, and what transformers does with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML, GPT2MLConfig, Tokenizer
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from tests.helpers.tiny import tiny_model, tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")

PROMPTS = [
    *(
        "春眠不觉晓，",
        "千山鸟飞绝，",
        "今天天气不错",
        "双十一",
        "科学空间",
        "月",
        "一片孤城万仞山，",
    ),
    *("白日依山尽，", "床前明月光，疑是地上霜。", "红豆生南国，春来发几枝。愿君多采撷，"),
]


def _ids(*shape: int, vocabulary: int = 4608, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(104, vocabulary, shape, generator=generator)


@torch.inference_mode()
def test_logits_are_ours_to_the_bit(model: Any, ours: GPT2ML) -> None:
    for rows, tokens in ((1, 1), (2, 7), (3, 129), (1, 1024)):
        ids = _ids(rows, tokens)
        assert torch.equal(model(ids).logits, ours(ids))


@pytest.mark.parametrize(("width", "heads", "mlp"), [(60, 5, 141), (96, 3, 100), (64, 1, 256)])
@torch.inference_mode()
def test_logits_are_ours_at_odd_sizes(tmp_path: Path, width: int, heads: int, mlp: int) -> None:
    tokenizer = tiny_tokenizer()
    config = GPT2MLConfig(
        vocab_size=tokenizer.num_embeddings,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=37,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    ours = GPT2ML(config).eval()
    ours.save_pretrained(tmp_path / "m.safetensors", tokenizer=tokenizer)
    folder = export_folder(tmp_path / "m.safetensors", tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = _ids(3, 37, vocabulary=tokenizer.num_embeddings)
    assert torch.equal(theirs(ids).logits, ours(ids))
    torch.testing.assert_close(
        theirs.double()(ids).logits, ours.double()(ids), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.inference_mode()
def test_every_attention_is_as_near_to_float64_as_ours(
    model: Any, ours: GPT2ML, implementation: str
) -> None:
    """By the 2x rule: at most twice our own error, and one rounding."""
    model.set_attn_implementation(implementation)
    ids = _ids(2, 50)
    exact = copy.deepcopy(ours).double()(ids)
    allowed = (
        2 * (ours(ids) - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    )
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes long
        for mask in (None, torch.ones_like(ids)):
            error = (model(ids, attention_mask=mask).logits - exact).abs().max()
            assert error <= allowed


def test_loss_and_gradients_are_ours(model: Any, ours: GPT2ML) -> None:
    ids = _ids(2, 30)
    ids[1, 20:] = 0  # padding, which the original leaves out of the mean
    reference = copy.deepcopy(ours)
    logits = reference(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0
    )
    expected.backward()
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = dict(model.named_parameters())
    block = reference.blocks[2]
    qkv = torch.cat([gradients[f"model.layers.2.self_attn.{x}_proj.weight"].grad for x in "qkv"])
    for found, wanted in (
        (qkv, block.attention.qkv.weight.grad),
        (gradients["model.layers.2.mlp.up_proj.weight"].grad, block.mlp.up.weight.grad),
        (gradients["model.embed_tokens.weight"].grad, reference.token_embedding.weight.grad),
        (gradients["model.embed_positions.weight"].grad, reference.position_embedding.weight.grad),
    ):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padded_batches_are_single_texts(
    model: Any, ours: GPT2ML, tokenizer: Any, side: str
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    logits = model(**batch).logits
    for row, mask, ids in zip(logits, batch["attention_mask"], batch["input_ids"], strict=True):
        single = ours(ids[mask.bool()][None])[0]
        torch.testing.assert_close(row[mask.bool()], single, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_texts_do_not_see_each_other(model: Any, ours: GPT2ML) -> None:
    first, second = _ids(1, 9), _ids(1, 14, seed=1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions).logits
    expected = torch.cat([ours(first), ours(second)], dim=1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_positions_past_the_last_are_an_error_that_names_the_cure(model: Any) -> None:
    with pytest.raises(ValueError, match=r"position 1024 .* 0 to 1023: .*Generator"):
        model(_ids(1, 1025))
    with pytest.raises(ValueError, match=r"position 1024 .* 0 to 1023: .*Generator"):
        model.generate(_ids(1, 1020), max_new_tokens=10, min_new_tokens=10)


def test_generation_with_a_compiled_step_raises_the_same_error(model: Any) -> None:
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    with pytest.raises(ValueError, match=r"position 1024 .* 0 to 1023: .*Generator"):
        model.generate(_ids(1, 1022), max_new_tokens=5, min_new_tokens=5)
    padded = (torch.arange(1030) >= 10).long()[None]
    model.prepare_inputs_for_generation(_ids(1, 1030), attention_mask=padded)  # 1,020 tokens


@torch.inference_mode()
def test_graphs_are_traced_without_the_check_of_positions(model: Any) -> None:
    del model.model.layers[2:]
    ids = _ids(2, 12)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


class _Missing(torch.nn.Identity):
    """What vLLM puts in the place of what another process has."""

    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        return input


@pytest.mark.parametrize("kept", [(), ("embed_tokens", "embed_positions", "embed_norm")])
@torch.inference_mode()
def test_the_layers_can_be_shared_out_to_two_processes(model: Any, kept: tuple[str, ...]) -> None:
    """By the class's plan; the second keeps what stands before the layers if it is tied."""
    ids = _ids(2, 12)
    expected = model(ids, use_cache=False).logits
    plan = model.config.base_model_pp_plan
    first, second = copy.deepcopy(model.model), copy.deepcopy(model)
    assert list(plan) == [name for name, _ in first.named_children()]
    for name in set(plan) - {"layers", *kept}:
        setattr(second.model, name, _Missing())
    for index in range(len(first.layers)):
        (first if index >= 2 else second.model).layers[index] = _Missing()
    h = first(ids, use_cache=False).last_hidden_state
    found = second(inputs_embeds=h, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_fresh_weights_are_drawn_as_the_original_draws_them(exported: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(exported, trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    layer = fresh.model.layers[0]
    for weight, std in (
        (fresh.model.embed_tokens.weight, 0.0141421),
        (layer.self_attn.k_proj.weight, 0.0141421),
        (layer.mlp.up_proj.weight, 0.02),
    ):
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # of one cut at 2 std
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert not layer.self_attn.q_proj.bias.any()
    assert layer.output_norm.weight.eq(1).all()


def test_special_and_reserved_ids_are_never_written(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ours = tiny_model(tokenizer)
    ours.save_pretrained(tmp_path / "m.safetensors", tokenizer=tokenizer)
    folder = export_folder(tmp_path / "m.safetensors", tmp_path / "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.tensor([tokenizer.encode("今天天气")] * 16)
    torch.manual_seed(0)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=5.0, top_k=0,
        max_new_tokens=50,
    )[:, 4:]  # fmt: skip
    assert not set(written.flatten().tolist()) & set(tokenizer.banned_ids)
    assert len(set(written.flatten().tolist())) > 20


def test_a_folder_without_code_loads_once_the_classes_are_registered(
    shipped_model: Path, tmp_path: Path, ours: GPT2ML
) -> None:
    import gpt2ml_torch.hf

    folder = export_folder(shipped_model, tmp_path / "folder", ExportOptions(code=False))
    assert not list(folder.glob("*.py"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is gpt2ml_torch.hf.GPT2MLForCausalLM
    ids = _ids(1, 5)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, ours(ids))
    # Saved, it carries its code with it.
    model.save_pretrained(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "modeling_gpt2ml.py").is_file()


def test_the_tokenizer_gives_our_ids_and_text(tokenizer: Any, our_tokenizer: Tokenizer) -> None:
    text = "春眠不觉晓，[MASK] Hello。"
    ids = tokenizer(text)["input_ids"]
    assert ids == our_tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == our_tokenizer.decode(ids)
    assert tokenizer("今天[SEP][PAD]")["input_ids"] == our_tokenizer.encode("今天[SEP][PAD]")
    assert tokenizer("今天" + tokenizer.eos_token)["input_ids"] == our_tokenizer.encode("今天")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 102)
