"""GPT2ML under torch.compile(fullgraph=True): training in every dtype, and decoding through the
cache.

Compared: compiled against eager PyTorch, same weights and dtype. What compilation does to the
accuracy of the logits is in tests/parity/test_precision.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpt2ml_torch import GPT2ML, KVCache
from tests.helpers.parity import (
    DTYPES,
    assert_within_twice,
    cross_entropy,
    make_model,
    random_ids,
    to_torch,
)
from tests.helpers.weights import Sizes, short_weights

SIZES = Sizes(layers=1, width=36, heads=3, mlp=100, vocab=211, positions=24)
IDS = to_torch(random_ids(SIZES))


def gradients(model: GPT2ML, *, compile_with: str | None) -> list[torch.Tensor]:
    forward: Callable[[torch.Tensor], torch.Tensor] = model
    if compile_with:
        torch.compiler.reset()
        forward = torch.compile(model, fullgraph=True, backend=compile_with)
    model.zero_grad()
    torch.manual_seed(0)
    cross_entropy(forward(IDS[:, :-1]).double(), IDS).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def new_model(dtype: torch.dtype, *, dropout: float) -> GPT2ML:
    return make_model(SIZES, short_weights(SIZES), dtype=dtype, dropout=dropout).train()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_with_dropout_is_one_graph_and_its_backward_runs(
    dtype: torch.dtype, recompute: bool
) -> None:
    """Traced and run op by op, so that four dtypes cost little: the same gradients."""
    model = new_model(dtype, dropout=0.1)
    model.gradient_checkpointing = recompute
    traced = gradients(model, compile_with="aot_eager")
    assert len(traced) == len(list(model.parameters()))
    for found, expected in zip(traced, gradients(model, compile_with=None), strict=True):
        scale = max(expected.abs().max().item(), 1e-3)
        assert (found - expected).abs().max() <= 20 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_training_strays_at_most_twice_as_far_as_eager(dtype: torch.dtype) -> None:
    """All gradients together, against eager float64 gradients from the same weights."""
    model = new_model(dtype, dropout=0.0)
    eager = gradients(model, compile_with=None)
    compiled = gradients(model, compile_with="inductor")
    exact = gradients(model.double(), compile_with=None)
    found, plain, true = (
        torch.cat([g.double().flatten() for g in gs]) for gs in (compiled, eager, exact)
    )
    assert_within_twice(found, plain, true, dtype)


def test_compiled_decoding_through_the_cache_compiles_once_and_refuses_bad_positions() -> None:
    torch.compiler.reset()
    model = new_model(torch.float64, dropout=0.1).eval()
    decode = torch.compile(model, fullgraph=True)
    cache = KVCache(model.config, batch_size=2, length=20, dtype=torch.float64)
    with torch.no_grad():
        full = model(IDS[:, :20])
        for at in range(20):
            positions = torch.full((2, 1), at)
            with torch.compiler.set_stance("fail_on_recompile" if at else "default"):
                logits = decode(IDS[:, at : at + 1], positions=positions, cache=cache)
            torch.testing.assert_close(logits[:, 0], full[:, at], rtol=0, atol=1e-12)
        for bad in (-1, 20):
            with pytest.raises((RuntimeError, ValueError), match="position"):
                decode(IDS[:, :1], positions=torch.full((2, 1), bad), cache=cache)
        with pytest.raises((RuntimeError, ValueError), match="token id"):
            decode(IDS[:, :1] * 0 + 211, positions=torch.zeros(2, 1).long(), cache=cache)
    torch.compiler.reset()


@pytest.mark.parametrize("bad", [-1, SIZES.vocab])
def test_ids_out_of_range_are_refused_in_compiled_training(bad: int) -> None:
    model = new_model(torch.float32, dropout=0.1)
    torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = IDS.clone()
    ids[1, 4] = bad
    with pytest.raises((RuntimeError, ValueError), match="token id"):
        forward(ids)


def test_too_many_tokens_are_refused_in_a_compiled_model() -> None:
    model = new_model(torch.float32, dropout=0.1)
    torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="25 tokens were given"):
        forward(torch.cat([IDS, IDS[:, :1]], dim=1))
