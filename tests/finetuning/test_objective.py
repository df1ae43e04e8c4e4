"""The chunked loss is the plain one: same value, same gradients, never all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import Objective, Rows, next_token_rows

VOCABULARY = 29


def small_model() -> GPT2ML:
    torch.manual_seed(0)
    config = GPT2MLConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
    )
    return GPT2ML(config)


def texts() -> Tensor:
    """Three rows of 14 tokens, the last ones padded with 0."""
    token_ids = torch.randint(1, VOCABULARY, (3, 14))
    token_ids[1, 9:] = 0
    token_ids[2, 2:] = 0
    return token_ids


def gradients(model: GPT2ML, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


@pytest.mark.parametrize("chunk", [1, 5, 13, 39, 1000])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunk: int) -> None:
    model, token_ids = small_model().double(), texts()
    plain = F.cross_entropy(
        model(token_ids[:, :-1]).flatten(0, 1),
        token_ids[:, 1:].flatten(),
        ignore_index=0,
        reduction="sum",
    )
    loss = Objective(model, chunk=chunk)(next_token_rows(token_ids))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, loss), gradients(model, plain))
    with torch.no_grad():
        again = Objective(model, chunk=chunk)(next_token_rows(token_ids))
    torch.testing.assert_close(again, loss.detach(), rtol=1e-12, atol=0)


def test_what_is_not_learned_is_still_context() -> None:
    model, rows = small_model().double(), next_token_rows(texts())
    losses = F.cross_entropy(
        model(rows.token_ids).transpose(1, 2), rows.labels, ignore_index=0, reduction="none"
    )
    rows.labels[:, :5] = 0  # a prompt of 6 tokens
    torch.testing.assert_close(Objective(model, chunk=4)(rows), losses[:, 5:].sum())


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    rows = next_token_rows(torch.zeros(2, 5, dtype=torch.int64))
    assert Objective(small_model())(rows).item() == 0.0


def test_bfloat16_logits_are_summed_in_float32() -> None:
    loss = Objective(small_model().bfloat16(), chunk=4)(next_token_rows(texts()))
    assert loss.dtype == torch.float32


def test_mixed_precision_computes_in_bfloat16_with_float32_weights_and_gradients() -> None:
    model, seen = small_model(), set()
    layer = model.get_submodule("blocks.0.mlp.up")
    layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    rows = next_token_rows(texts())
    loss = Objective(model, mixed=True)(rows)
    plain = Objective(model)(rows)
    assert torch.bfloat16 in seen
    assert loss.item() == pytest.approx(plain.item(), rel=2e-3)
    assert loss.item() != plain.item()
    assert {g.dtype for g in gradients(model, loss).values()} == {torch.float32}


def test_no_tensor_of_all_logits_is_made() -> None:
    model, rows = small_model(), next_token_rows(texts())
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (VOCABULARY,):
                largest = max(largest, out.numel() // VOCABULARY)
            return out

    with Watch():
        Objective(model, chunk=9)(rows).backward()
    assert largest == 9


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_ids_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    rows = next_token_rows(torch.ones(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(B, T\)"):
        Objective(small_model())(rows)
    one = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \(B, T\)"):
        Objective(small_model())(Rows(one, one[:, 1:], one, one))
