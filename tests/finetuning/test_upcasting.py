"""bfloat16 weights computed with in float32: gradients in bfloat16, nearer to float32's."""

from __future__ import annotations

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, GPT2MLConfig
from gpt2ml_torch.finetuning import FinetuneConfig, Objective, next_token_rows, upcasting
from gpt2ml_torch.finetuning.components import upcasts
from gpt2ml_torch.finetuning.lora import add_adapter
from tests.helpers.tiny import tiny_model, tiny_tokenizer


def small_model() -> GPT2ML:
    torch.manual_seed(0)
    config = GPT2MLConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return GPT2ML(config).bfloat16().train()


def loss_of(model: GPT2ML) -> torch.Tensor:
    torch.manual_seed(1)
    loss: torch.Tensor = Objective(model, chunk=16)(next_token_rows(torch.randint(1, 50, (2, 30))))
    return loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_every_gradient_are_nearer_to_float32s_than_those_of_bfloat16_products(
    checkpointing: bool,
) -> None:
    plain, upcast, exact = small_model(), small_model(), small_model().float()
    names = list(upcast.state_dict())
    upcasting.upcast_products(upcast)
    upcast.gradient_checkpointing = checkpointing
    assert list(upcast.state_dict()) == names
    losses = [loss_of(model) for model in (plain, upcast, exact)]
    for loss in losses:
        loss.backward()
    ids = torch.arange(1, 31)[None]
    logits = [model.logits(model.hidden_states(ids)) for model in (plain, upcast, exact)]
    far = [float((found - logits[2]).detach().norm()) for found in logits[:2]]
    assert far[1] < far[0]
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        strayed = []
        for model in (plain, upcast):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert gradient.dtype == torch.bfloat16
            strayed.append(float((gradient - parameter.grad).norm() / parameter.grad.norm()))
        if "qkv.bias" not in name:  # the keys' share of it is nothing but rounding
            assert strayed[1] < strayed[0], name


def test_decoding_and_adapters_go_on_working() -> None:
    tokenizer = tiny_tokenizer()
    texts = []
    for upcast in (False, True):
        model = tiny_model(tokenizer).bfloat16()
        if upcast:
            upcasting.upcast_products(model)
        generator = Generator(model, tokenizer, compile=False)
        texts.append(generator.generate("今天", max_new_tokens=12, top_k=1))
    assert texts[0] == texts[1]
    model = small_model()
    add_adapter(model, rank=4)
    upcasting.upcast_products(model)
    loss_of(model).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 3 * 4 * 2
    assert all("lora_" in name for name in trained)


def test_it_is_for_bfloat16_weights_on_a_cpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(features: set[str], **settings: object) -> bool:
        monkeypatch.setattr(upcasting, "cpu_features", lambda: frozenset(features))
        values = {"model": "m", "data": ("d",), "out": "o.safetensors"} | settings
        return upcasts(FinetuneConfig(**values))  # type: ignore[arg-type]

    assert used({"avx2", "avx512f"})
    assert not used({"avx512f", "avx512_bf16"})
    assert not used({"amx_bf16"})
    assert not used(set())  # not Linux on x86: unknown
    assert not used({"avx2"}, precision="float32")
    assert not used({"avx2"}, precision="mixed")
    assert not used({"avx2"}, device="cuda")
    assert not used({"avx2"}, upcast=False)
    assert used({"amx_bf16"}, upcast=True)
    with pytest.raises(ValueError, match="upcast concerns bfloat16"):
        used({"avx2"}, upcast=True, precision="mixed")
