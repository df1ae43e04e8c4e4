"""Float32, bfloat16 and float16 by the 2x rule, eager and compiled, on the CPU and on CUDA.

Compared: the error of GPT2ML's logits against that of `parity.plain_logits`, the same model written
out in eager PyTorch operations, on the same device, in the same dtype and from the same weights
(loud ones, rounded to that dtype). Both errors are the largest distance to the TensorFlow reference
in float64 from these rounded weights. On the CPU also against eager TensorFlow in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML
from tests.helpers.parity import (
    ODD_SIZES,
    assert_within_twice,
    exact_logits,
    largest_error,
    loud_model,
    plain_logits,
    random_ids,
    to_torch,
)
from tests.tf_reference import Array, Sizes, TFReference, Weights

LOW = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Sizes(layers=2, width=36, heads=3, mlp=100, vocab=211, positions=40)

pytestmark = pytest.mark.usefixtures("no_tf32")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
def test_eager_logits_stray_at_most_twice_as_far_as_plain_pytorch(
    sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> None:
    model, weights = loud_model(sizes, dtype=dtype)
    ids = random_ids(sizes, rows=3)
    model, tokens = model.to(device), to_torch(ids).to(device)
    with torch.no_grad():
        found = model(tokens)
        plain = plain_logits(model.state_dict(), tokens, heads=sizes.heads)
    assert found.dtype == dtype
    assert_within_twice(found, plain, exact_logits(sizes, weights, ids), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_eager_logits_stray_at_most_twice_as_far_as_tensorflow(dtype: torch.dtype) -> None:
    sizes = ODD_SIZES[3]
    model, weights = loud_model(sizes, dtype=dtype)
    ids = random_ids(sizes, rows=3)
    with torch.no_grad():
        found = model(to_torch(ids))
    theirs = TFReference(weights, heads=sizes.heads).logits(ids)
    assert_within_twice(found, theirs, exact_logits(sizes, weights, ids), dtype)


class Compiled(NamedTuple):
    model: GPT2ML
    forward: Callable[[Tensor], Tensor]
    weights: Weights
    ids: Array
    device: torch.device


# One compilation for each dtype and device serves every test below; the scope makes pytest group
# them by it.
@pytest.fixture(
    scope="module", params=[*LOW, torch.float64], ids=lambda dtype: str(dtype).split(".")[1]
)
def compiled(request: pytest.FixtureRequest, compile_device: torch.device) -> Iterator[Compiled]:
    torch.compiler.reset()
    model, weights = loud_model(SMALL, dtype=request.param)
    model = model.to(compile_device)
    forward = torch.compile(model, fullgraph=True)
    yield Compiled(model, forward, weights, random_ids(SMALL), compile_device)
    torch.compiler.reset()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def compile_device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(request.param)


def test_compiled_logits_stray_at_most_twice_as_far_as_plain_pytorch(compiled: Compiled) -> None:
    tokens = to_torch(compiled.ids).to(compiled.device)
    exact = exact_logits(SMALL, compiled.weights, compiled.ids)
    with torch.no_grad():
        found = compiled.forward(tokens)
        plain = plain_logits(compiled.model.state_dict(), tokens, heads=SMALL.heads)
    if found.dtype == torch.float64:
        assert largest_error(found, exact) <= 1e-12
    else:
        assert_within_twice(found, plain, exact, found.dtype)


@pytest.mark.parametrize("bad", [-1, SMALL.vocab])
def test_compiled_forward_refuses_ids_out_of_range(compiled: Compiled, bad: int) -> None:
    if compiled.device.type == "cuda":
        pytest.skip("a failed assertion of a CUDA graph ends the process's use of the device")
    tokens = to_torch(compiled.ids)
    tokens[1, 3] = bad
    with pytest.raises((RuntimeError, ValueError), match="token id"), torch.no_grad():
        compiled.forward(tokens)


def test_compiled_forward_is_one_graph_and_compiles_once(compiled: Compiled) -> None:
    tokens = to_torch(compiled.ids).to(compiled.device)
    with torch.no_grad():
        first = compiled.forward(tokens)
        with torch.compiler.set_stance("fail_on_recompile"):
            again = compiled.forward(tokens.flip(0))
    assert torch.equal(again.flip(0), first)
