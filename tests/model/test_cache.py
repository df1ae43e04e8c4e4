"""Decoding through KVCache gives the full forward's logits, however the text is cut and batched.

Compared, where nothing else is said: float64 logits through the cache and without it, both from
GPT2ML on the CPU, within 1e-12.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML, KVCache
from tests.helpers.parity import (
    assert_within_twice,
    inputs_of,
    loud_model,
    model_of,
    to_float64,
)
from tests.helpers.properties import given, settings, st
from tests.helpers.reference import GOLDEN
from tests.helpers.weights import Sizes

CASE = GOLDEN["odd"]
SIZES = CASE.sizes
T = SIZES.positions

MODEL = model_of(CASE)
IDS = inputs_of(CASE)
with torch.no_grad():
    FULL = MODEL(IDS)


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.no_grad():
        yield


def new_cache(
    model: GPT2ML = MODEL, *, rows: int = 3, length: int = T, garbage: float = 0.0
) -> KVCache:
    cache = KVCache(model.config, batch_size=rows, length=length, dtype=model.dtype)
    for buffer in (cache.keys, cache.values):
        buffer.copy_(torch.randn(buffer.shape, dtype=torch.float32) * garbage)
    return cache


def feed(cache: KVCache, cuts: list[int], *, model: GPT2ML = MODEL, ids: Tensor = IDS) -> Tensor:
    """Logits of the tokens up to the last cut, fed chunk by chunk."""
    positions = torch.arange(T).expand(len(ids), T)
    chunks = [
        model(ids[:, start:end], positions=positions[:, start:end], cache=cache)
        for start, end in pairwise([0, *cuts])
    ]
    return torch.cat(chunks, dim=1)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_step_by_step_gives_the_logits_of_the_whole_up_to_the_last_position() -> None:
    assert_equal(feed(new_cache(), list(range(1, T + 1))), FULL)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, T - 1)))
def test_any_chunks_give_the_logits_of_the_whole(cuts: set[int]) -> None:
    with torch.no_grad():
        assert_equal(feed(new_cache(), [*sorted(cuts), T]), FULL)


@pytest.mark.parametrize("length", [9, 10, 17, T])
def test_a_cache_longer_than_the_text_changes_nothing(length: int) -> None:
    assert_equal(feed(new_cache(length=length), [4, 5, 9]), FULL[:, :9])


@pytest.mark.parametrize("garbage", [1.0, 1e4, 1e30])
def test_what_lies_beyond_the_position_is_never_seen(garbage: float) -> None:
    assert torch.equal(
        feed(new_cache(garbage=garbage), [3, 4, 9, 10]), feed(new_cache(), [3, 4, 9, 10])
    )


def test_what_lies_before_the_position_is_seen() -> None:
    cache = new_cache()
    feed(cache, [5])
    cache.values[:, :, 2] += 1
    later = MODEL(IDS[:, 5:6], positions=torch.full((3, 1), 5), cache=cache)
    assert (later - FULL[:, 5:6]).abs().amin(dim=(1, 2)).max() > 1e-6


def test_rows_of_different_lengths_are_decoded_at_their_own_positions() -> None:
    lengths = torch.tensor([2, 9, 5])
    cache = new_cache()
    # Filled to the longest; the tail of the shorter rows is overwritten step by step.
    first = IDS[:, :9].masked_fill(torch.arange(9) >= lengths[:, None], 0)
    prefill = MODEL(first, positions=torch.arange(9).expand(3, 9), cache=cache)
    for row, length in enumerate(lengths):
        assert_equal(prefill[row, :length], FULL[row, :length])
    for step in range(6):
        at = (lengths + step)[:, None]  # (B, 1)
        logits = MODEL(IDS.gather(1, at), positions=at, cache=cache)
        assert_equal(logits[:, 0], FULL[torch.arange(3), at[:, 0]])


def test_rows_may_be_reordered_copied_and_dropped() -> None:
    cache = new_cache()
    feed(cache, [6])
    order = torch.tensor([2, 0, 2, 1])
    wider = new_cache(rows=4)
    wider.keys.copy_(cache.keys[:, order])
    wider.values.copy_(cache.values[:, order])
    logits = MODEL(IDS[order, 6:9], positions=torch.arange(6, 9).expand(4, 3), cache=wider)
    assert_equal(logits, FULL[order, 6:9])


def test_rows_do_not_see_each_other() -> None:
    """Bit for bit: the shapes, and so the order of the additions, are the same."""
    others = IDS.clone()
    others[1:] = others[1:].flip(1)
    assert torch.equal(MODEL(others)[0], MODEL(IDS)[0])
    assert torch.equal(feed(new_cache(), [4, 7], ids=others)[0], feed(new_cache(), [4, 7])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_has_the_logits_it_has_in_a_batch(dtype: torch.dtype) -> None:
    """Another batch size may add in another order: the 2x rule, against the row in the batch."""
    model = model_of(CASE, dtype)
    exact = to_float64(CASE.logits())[1:2]
    assert_within_twice(model(IDS[1:2]), model(IDS)[1:2], exact, dtype)
    alone = feed(new_cache(model, rows=1), [4, 9], model=model, ids=IDS[1:2])
    batch = feed(new_cache(model), [4, 9], model=model)[1:2]
    assert_within_twice(alone, batch, exact[:, :9], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cache_costs_no_accuracy(dtype: torch.dtype) -> None:
    """Compared: errors against float64, through the cache and without, in the same dtype."""
    model = model_of(CASE, dtype)
    exact = to_float64(CASE.logits())
    steps = feed(new_cache(model, garbage=1e4), [7, *range(8, T + 1)], model=model)
    assert_within_twice(steps, model(IDS), exact, dtype)


def test_feeding_a_position_again_replaces_it() -> None:
    cache = new_cache()
    wrong = IDS.clone()
    wrong[:, 3:] = 1
    feed(cache, [8], ids=wrong)
    positions = torch.arange(3, 8).expand(3, 5)
    assert_equal(MODEL(IDS[:, 3:8], positions=positions, cache=cache), FULL[:, 3:8])


def test_the_cache_keeps_its_tensors() -> None:
    cache = new_cache()
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    feed(cache, [5])
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == before
    assert cache.keys.shape == (SIZES.layers, 3, T, SIZES.heads, SIZES.width // SIZES.heads)


def test_the_cache_is_used_with_gradient_checkpointing_in_training_too() -> None:
    model = model_of(CASE)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing = True
    assert_equal(feed(new_cache(), [4, 9], model=model), FULL[:, :9])


@pytest.mark.parametrize("length", [0, -1, T + 1])
def test_a_cache_of_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"{length} slots.*1 to {T}"):
        KVCache(MODEL.config, batch_size=1, length=length)


def test_a_position_past_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="position 8 is out of range"):
        feed(new_cache(length=8), [8, 9])


def test_more_tokens_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 tokens.*8 cache slots"):
        MODEL(IDS[:, :9], cache=new_cache(length=8))


@pytest.mark.parametrize("rows", [1, 2, 4])  # one row would broadcast, and be wrong in silence
def test_a_cache_for_another_batch_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"shape \(3, {rows}, .*with 3 rows"):
        feed(new_cache(rows=rows), [4])


def test_a_cache_of_another_dtype_is_refused() -> None:
    cache = KVCache(MODEL.config, batch_size=3, length=T, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        feed(cache, [4])


def test_a_cache_of_another_model_is_refused() -> None:
    other, _ = loud_model(Sizes(layers=2, width=30, heads=3, mlp=50, vocab=101, positions=24))
    with pytest.raises(ValueError, match="cache"):
        feed(new_cache(other), [4])
