"""Float32, bfloat16 and float16 by the 2x rule, eager and compiled, on the CPU and on CUDA.

Compared: the error of GPT2ML's logits with the error of `parity.plain_logits`, the same model
written out in eager PyTorch operations, on the same device, in the same dtype and from the same
weights, which are loud and which every dtype holds exactly. Both errors are distances to the
TensorFlow reference in float64. On the CPU also against eager TensorFlow in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2ml_torch import GPT2ML, kernels
from gpt2ml_torch.checking.machine import leave_kernels
from gpt2ml_torch.precision import Precision
from tests.helpers.parity import (
    ODD_SIZES,
    assert_within_twice,
    inputs_of,
    largest_error,
    model_of,
    plain_logits,
    to_float64,
)
from tests.helpers.reference import GOLDEN, Case

LOW = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
ODD = GOLDEN["odd"]
CASES = [*GOLDEN.values(), *map(Case, ODD_SIZES)]

pytestmark = pytest.mark.usefixtures("no_tf32")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_logits_stray_at_most_twice_as_far_as_plain_pytorch(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    model, tokens = model_of(case, dtype).to(device), inputs_of(case).to(device)
    with torch.no_grad():
        found = model(tokens)
        plain = plain_logits(model.state_dict(), tokens, heads=case.sizes.heads)
    assert found.dtype == dtype
    assert_within_twice(found, plain, to_float64(case.logits()), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_eager_logits_stray_at_most_twice_as_far_as_tensorflow(dtype: torch.dtype) -> None:
    with torch.no_grad():
        found = model_of(ODD, dtype)(inputs_of(ODD))
    theirs = ODD.logits(str(dtype).removeprefix("torch."))
    assert_within_twice(found, theirs, to_float64(ODD.logits()), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_attention_backend_on_cuda_strays_at_most_twice_as_far_as_plain_pytorch(
    backend: SDPBackend, dtype: torch.dtype
) -> None:
    """With heads of 64, the published size, which is the one that all backends take."""
    case = GOLDEN["heads-of-64"]
    model, tokens = model_of(case, dtype).cuda(), inputs_of(case).cuda()
    with torch.no_grad():
        plain = plain_logits(model.state_dict(), tokens, heads=case.sizes.heads)
        try:
            with sdpa_kernel(backend):
                found = model(tokens)
        except RuntimeError as error:
            if backend == SDPBackend.MATH or "available kernel" not in str(error):
                raise
            pytest.skip(f"{backend} does not take {dtype} here: {error}")
    assert_within_twice(found, plain, to_float64(case.logits()), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_row_alone_on_cuda_strays_at_most_twice_as_far_as_in_its_batch(
    dtype: torch.dtype,
) -> None:
    model, tokens = model_of(ODD, dtype).cuda(), inputs_of(ODD).cuda()
    exact = to_float64(ODD.logits())
    with torch.no_grad():
        together, alone = model(tokens), torch.cat([model(row[None]) for row in tokens])
    assert_within_twice(alone, together, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4], ids=str)
def test_packed_weights_without_kernels_stray_at_most_twice_as_far_as_what_they_stand_for(
    precision: Precision, dtype: torch.dtype, device: torch.device
) -> None:
    """As on CUDA, where there are no kernels for them; exact are the integers times their scales,
    in float64.
    """
    model, tokens = model_of(ODD, dtype), inputs_of(ODD).to(device)
    kernels.pack_model(model, precision)
    leave_kernels(model)
    model = model.to(device)
    state = {name: value.double() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, kernels.PackedLinear | kernels.PackedEmbedding):
            state[f"{name}.weight"] = module.dequantized().double()
    plain = plain_logits(
        {name: value.to(dtype) for name, value in state.items()}, tokens, heads=ODD.sizes.heads
    )
    exact = to_float64(plain_logits(state, tokens, heads=ODD.sizes.heads))
    with torch.no_grad():
        assert_within_twice(model(tokens), plain, exact, dtype)


class Compiled(NamedTuple):
    model: GPT2ML
    forward: Callable[[Tensor], Tensor]
    tokens: Tensor
    device: torch.device


# One compilation for each dtype and device serves every test below; the scope makes pytest group
# them by it.
@pytest.fixture(
    scope="module", params=[*LOW, torch.float64], ids=lambda dtype: str(dtype).split(".")[1]
)
def compiled(request: pytest.FixtureRequest, compile_device: torch.device) -> Iterator[Compiled]:
    torch.compiler.reset()
    model = model_of(ODD, request.param).to(compile_device)
    forward = torch.compile(model, fullgraph=True)
    yield Compiled(model, forward, inputs_of(ODD).to(compile_device), compile_device)
    torch.compiler.reset()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def compile_device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(request.param)


@pytest.mark.slow
def test_compiled_logits_stray_at_most_twice_as_far_as_plain_pytorch(compiled: Compiled) -> None:
    exact = to_float64(ODD.logits())
    with torch.no_grad():
        found = compiled.forward(compiled.tokens)
        plain = plain_logits(compiled.model.state_dict(), compiled.tokens, heads=ODD.sizes.heads)
    if found.dtype == torch.float64:
        assert largest_error(found, exact) <= 4e-12  # another order of sums: see test_logits.py
    else:
        assert_within_twice(found, plain, exact, found.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [-1, ODD.sizes.vocab])
def test_compiled_forward_refuses_ids_out_of_range(compiled: Compiled, bad: int) -> None:
    if compiled.device.type == "cuda":
        pytest.skip("a failed assertion of a CUDA graph ends the process's use of the device")
    tokens = compiled.tokens.clone()
    tokens[1, 3] = bad
    with pytest.raises((RuntimeError, ValueError), match="token id"), torch.no_grad():
        compiled.forward(tokens)


@pytest.mark.slow
def test_compiled_forward_is_one_graph_and_compiles_once(compiled: Compiled) -> None:
    tokens = compiled.tokens
    with torch.no_grad():
        first = compiled.forward(tokens)
        with torch.compiler.set_stance("fail_on_recompile"):
            again = compiled.forward(tokens.flip(0))
    assert torch.equal(again.flip(0), first)
