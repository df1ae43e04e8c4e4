"""The engine: texts read in chunks, what `refresh` notices, and what is asked of the compiler."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from gpt2ml_torch import GPT2ML, kernels
from gpt2ml_torch.generation import engine
from gpt2ml_torch.generation.engine import Engine, decode
from tests.helpers.tiny import tiny_model, tiny_tokenizer

IDS = [101 + (7 * place) % 20 for place in range(40)]


def new_engine(kind: str) -> Engine:
    model: GPT2ML = tiny_model(tiny_tokenizer())
    if kind == "kernels":
        if not kernels.load_kernels():
            pytest.skip("the kernels could not be built")
        kernels.pack_model(model, "int8")
    engine = Engine(model if kind == "kernels" else model.double(), compile=False)
    engine.on_cuda = kind == "as on CUDA"
    return engine


@pytest.mark.parametrize("kind", ["eager", "as on CUDA", "kernels"])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [16, 16, 8], [1, 38, 1], [3, 17, 20]], ids=str)
def test_a_text_read_in_chunks_has_the_logits_of_one_read(kind: str, sizes: list[int]) -> None:
    engine = new_engine(kind)
    whole, _ = engine.read(IDS)
    cache = engine.new_cache(3, engine.limit)
    neighbour = engine.read_into(cache, 0, IDS[:9])
    start = 0
    for size in sizes:
        logits = engine.read_chunk(cache, 1, IDS[start : start + size], start)
        start += size
    bound = 0.0 if kind == "kernels" else 1e-12
    assert (logits - whole).abs().max() <= bound
    # The rows beside it are as they were: the first goes on from what it read.
    ids, positions = torch.tensor([[105]] * 3), torch.tensor([[9], [40], [0]])
    after = engine.decode(ids, positions, cache)
    alone, _ = engine.read([*IDS[:9], 105])
    assert (after[0, 0] - alone[0]).abs().max() <= bound
    longer, _ = engine.read([*IDS, 105])
    assert (after[1, 0] - longer[0]).abs().max() <= bound
    assert not torch.equal(neighbour, whole)


def test_refresh_drops_compiled_steps_when_a_constant_has_changed() -> None:
    engine = Engine(tiny_model(tiny_tokenizer()))
    engine._steps["a step"] = mock.sentinel.step  # type: ignore[index]
    engine.refresh()
    assert engine._steps
    engine.model.blocks[1].mlp_norm.eps *= 2
    engine.refresh()
    assert not engine._steps


def test_refresh_does_not_look_through_a_model_that_runs_on_the_kernels() -> None:
    """It is asked at every call, and 48 layers take 4 ms to look through."""
    used = new_engine("kernels")
    with mock.patch.object(engine, "outline") as looks:
        used.refresh()
        assert used.on_kernels
        looks.assert_not_called()
        used.model.blocks[1].mlp_norm.eps *= 2  # which the kernels have as a constant
        used.refresh()
    assert not used.on_kernels


@pytest.mark.parametrize("replay", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("on_cuda", [True, False])
def test_only_decoding_on_cuda_is_tuned_for_products_of_one_row(
    on_cuda: bool, replay: bool
) -> None:
    engine = new_engine("eager")
    engine.on_cuda = on_cuda
    with mock.patch.object(torch, "compile") as compiles:
        engine._compile(decode, replay=replay)
    options: dict[str, Any] = compiles.call_args.kwargs["options"]
    known = set(torch._inductor.list_options()) | {"guard_filter_fn"}
    assert set(options) <= known
    for name in ("triton.cudagraphs", "coordinate_descent_tuning", "triton.unique_kernel_names"):
        assert options.get(name, False) == (on_cuda and replay)
