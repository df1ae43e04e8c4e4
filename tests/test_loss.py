"""The chunked loss is the plain one: same value, same gradients, never all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning.loss import next_token_loss

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
    return GPT2ML(config).double()


def rows() -> Tensor:
    """Three rows of 14 tokens, the last ones padded with 0."""
    token_ids = torch.randint(1, VOCABULARY, (3, 14))
    token_ids[1, 9:] = 0
    token_ids[2, 2:] = 0
    return token_ids


def gradients(model: GPT2ML, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 39, 1000])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunk_size: int) -> None:
    model, token_ids = small_model(), rows()
    plain = F.cross_entropy(
        model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=0
    )
    loss = next_token_loss(model, token_ids, chunk_size=chunk_size)
    assert int(loss.targets) == 13 + 8 + 1
    torch.testing.assert_close(loss.mean, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, loss.mean), gradients(model, plain))


def test_masked_tokens_are_no_targets_but_still_context() -> None:
    model, token_ids = small_model(), rows()
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    mask[:, :6] = False  # a prompt of 6 tokens
    losses = F.cross_entropy(
        model(token_ids[:, :-1]).transpose(1, 2), token_ids[:, 1:], ignore_index=0, reduction="none"
    )
    loss = next_token_loss(model, token_ids, loss_mask=mask, chunk_size=4)
    assert int(loss.targets) == 8 + 3
    torch.testing.assert_close(loss.mean, losses[:, 5:].sum() / 11)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    loss = next_token_loss(small_model(), torch.zeros(2, 5, dtype=torch.int64))
    assert (loss.mean.item(), loss.targets.item()) == (0.0, 0)


def test_no_tensor_of_all_logits_is_made() -> None:
    model, token_ids = small_model(), rows()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (VOCABULARY,):
                largest = max(largest, out.numel() // VOCABULARY)
            return out

    with Watch():
        next_token_loss(model, token_ids, chunk_size=9).mean.backward()
    assert largest == 9


@pytest.mark.parametrize("shape", [(7,), (2, 1), (2, 3, 4)])
def test_ids_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        next_token_loss(small_model(), torch.ones(shape, dtype=torch.int64))
