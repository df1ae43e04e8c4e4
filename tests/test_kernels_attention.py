"""Attention over the cache: against float64, and each token independent of how it was fed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch import kernels
from gpt2ml_torch.kernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(
    not kernels.load_kernels(), reason="no compiler or no AVX2: PyTorch's operators run instead"
)


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def fresh_cache(like: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Empty slots hold NaN, so that reading one shows."""
    shape = (like.shape[0], slots, *like.shape[2:])
    return like.new_full(shape, torch.nan), like.new_full(shape, torch.nan)


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def stored(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache with the new keys and values in the slots of their positions."""
    rows = torch.arange(len(k))[:, None]
    return keys.index_put_((rows, positions), k), values.index_put_((rows, positions), v)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", ops.KERNEL_HEAD_SIZES)
def test_agrees_with_causal_attention_in_float64(dtype: torch.dtype, head_size: int) -> None:
    for tokens in (1, 2, 15, 16, 17, 70):
        q, k, v = (heads(2, tokens, 3, head_size, dtype=dtype) for _ in range(3))
        keys, values = fresh_cache(q, 80)
        positions = torch.arange(tokens).expand(2, tokens)
        stored(k, v, keys, values, positions)
        found = kernels.cached_attention(q, keys, values, positions)
        expected = in_float64(q, k, v)
        plain = ops._plain_attention(q, keys.nan_to_num(), values.nan_to_num(), positions)
        # Two times the error of PyTorch's own in this dtype, plus one rounding.
        bound = 2 * (plain.double() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (found.double() - expected).norm() <= bound


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_in_chunks_and_in_a_batch(dtype: torch.dtype) -> None:
    q, k, v = (heads(3, 50, 2, 64, dtype=dtype) for _ in range(3))
    positions = torch.arange(50).expand(3, 50)
    whole = kernels.cached_attention(q, *stored(k, v, *fresh_cache(q, 50), positions), positions)
    for chunk in (1, 7, 32):
        keys, values = fresh_cache(q[1:2], 64)
        for begin in range(0, 50, chunk):
            part = slice(begin, begin + chunk)
            new_q, new_k, new_v = (t[1:2, part] for t in (q, k, v))
            stored(new_k, new_v, keys, values, positions[1:2, part])
            found = kernels.cached_attention(new_q, keys, values, positions[1:2, part])
            assert torch.equal(found, whole[1:2, part])


@needs_kernels
def test_rows_may_stand_at_different_positions_and_in_strided_memory() -> None:
    joined = heads(2, 1, 9, 64)
    q, k, v = joined.unflatten(2, (3, 3)).unbind(2)
    slots = heads(2, 2, 40, 3, 64)
    keys, values = slots.unbind(0)
    positions = torch.tensor([[5], [39]])
    stored(k, v, keys, values, positions)
    expected = ops._plain_attention(q, keys, values, positions)
    torch.testing.assert_close(kernels.cached_attention(q, keys, values, positions), expected)


@needs_kernels
def test_a_position_outside_the_cache_is_an_error() -> None:
    q = heads(1, 1, 1, 16)
    for position in (-1, 4):
        with pytest.raises(RuntimeError, match="outside the cache of 4 slots"):
            kernels.cached_attention(q, *fresh_cache(q, 4), torch.tensor([[position]]))


@needs_kernels
def test_it_compiles_in_one_graph() -> None:
    q, k, v = (heads(2, 3, 2, 32) for _ in range(3))
    positions = torch.arange(3).expand(2, 3)
    cache = stored(k, v, *fresh_cache(q, 8), positions)
    attend = torch.compile(kernels.cached_attention, fullgraph=True, backend="aot_eager")
    expected = kernels.cached_attention(q, *cache, positions)
    assert torch.equal(attend(q, *cache, positions), expected)


@needs_kernels
def test_the_operator_is_declared_as_it_behaves() -> None:
    q = heads(1, 2, 2, 16)
    cache = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16)
    torch.library.opcheck(
        torch.ops.gpt2ml.cached_attention.default,
        (q, *cache, torch.arange(2)[None]),
    )


@needs_kernels
def test_built_in_gelu_is_the_exact_one() -> None:
    """Within float32 rounding of the erf form; the tanh form is 4.7e-4 away."""
    x = torch.linspace(-12, 12, 4096)[:, None]
    weight, scale = kernels.pack(torch.eye(1), "bfloat16")
    plain = kernels.packed_linear(x, weight, scale, None, bits=16, outputs=1)
    found = kernels.packed_linear(x, weight, scale, None, bits=16, outputs=1, gelu=True)
    torch.testing.assert_close(found.double(), F.gelu(plain.double()), atol=6e-7, rtol=3e-7)
