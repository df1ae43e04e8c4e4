"""All layers as one operator: against float64, and each token independent of how it was fed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import GPT2MLConfig, KVCache, kernels
from gpt2ml_torch.kernels import ops
from gpt2ml_torch.model import Block
from gpt2ml_torch.precision import PACKABLE, Precision
from tests.helpers.tiny import KERNEL_CONFIG, loud_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOTS = 80
needs_kernels = pytest.mark.skipif(
    not kernels.load_kernels(), reason="no compiler or no AVX2: PyTorch's operators run instead"
)


def loud_block(*, heads: int, width: int, inner: int, dtype: torch.dtype = torch.float32) -> Block:
    """Near-unit activations, and norms and biases that matter."""
    config = GPT2MLConfig(
        vocab_size=10,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    block = Block(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return block.requires_grad_(False).to(dtype)


class KeysValues(NamedTuple):
    """One layer's cache, (B, S, H, K)."""

    keys: Tensor
    values: Tensor


def empty_cache(h: Tensor, heads: int, *, slots: int = SLOTS) -> KeysValues:
    """Slots hold NaN, so that reading an empty one shows."""
    shape = (h.shape[0], slots, heads, h.shape[2] // heads)
    return KeysValues(h.new_full(shape, torch.nan), h.new_full(shape, torch.nan))


def positions_of(h: Tensor, first: int = 0) -> Tensor:
    return torch.arange(first, first + h.shape[1]).expand(h.shape[:2])


def arguments(block: Block, h: Tensor, cache: KeysValues, positions: Tensor) -> dict[str, Any]:
    """Of the operator, for one layer."""
    layers = (block.attention.qkv, block.attention.output, block.mlp.up, block.mlp.down)
    scales = [cast(Tensor | None, layer.weight_scale) for layer in layers]
    return {
        "h": h,
        "positions": positions,
        "keys": cache.keys[None],
        "values": cache.values[None],
        "weights": [layer.weight for layer in layers],
        "scales": [scale for scale in scales if scale is not None],
        "biases": [layer.bias for layer in layers],
        "norms": [*block.mlp_norm.parameters(), *block.output_norm.parameters()],
        "bits": cast(int, layers[0].bits),
    }


def run(block: Block, h: Tensor, cache: KeysValues, positions: Tensor) -> Tensor:
    assert kernels.supports_layers(h, cache.keys.shape[-1])
    return kernels.packed_layers(**arguments(block, h, cache, positions))


def unpacked_twin(packed: Block, plain: Block) -> Block:
    """In float64, the plain block with the weights that the packed one stands for."""
    twin = copy.deepcopy(plain).double()
    for name, layer in packed.named_modules():
        if isinstance(layer, kernels.PackedLinear):
            twin.get_parameter(f"{name}.weight").copy_(layer.dequantized())
    return twin


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", ops.KERNEL_HEAD_SIZES)
def test_agrees_with_the_plain_block_in_float64(dtype: torch.dtype, head_size: int) -> None:
    """In each dtype at most twice PyTorch's own error, plus one rounding of the result."""
    plain = loud_block(heads=3, width=3 * head_size, inner=100, dtype=dtype)
    packed = kernels.pack_model(copy.deepcopy(plain), str(dtype).removeprefix("torch."))
    twin = copy.deepcopy(plain).double()
    for tokens in (1, 3, 15, 16, 17, 70):
        h = torch.randn(2, tokens, 3 * head_size).to(dtype)
        found = run(packed, h, empty_cache(h, 3), positions_of(h))
        expected = twin(h.double())
        error = (found.double() - expected).norm()
        plain_error = (plain(h).double() - expected).norm()
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * expected.norm()


@needs_kernels
@pytest.mark.parametrize("precision", PACKABLE)
def test_agrees_with_the_unpacked_weights_within_the_rounding_of_inputs(precision: str) -> None:
    plain = loud_block(heads=2, width=128, inner=500)
    packed = kernels.pack_model(copy.deepcopy(plain), precision)
    h = torch.randn(2, 40, 128)
    expected = unpacked_twin(packed, plain)(h.double())
    found = run(packed, h, empty_cache(h, 2), positions_of(h))
    # Each of four layers rounds its inputs; see INPUT_ROUNDING of the tests of one product.
    bound = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 0.008, "int8": 0.03, "int4": 0.03}
    assert (found.double() - expected).norm() <= bound[precision] * expected.norm()


@needs_kernels
@pytest.mark.parametrize("precision", PACKABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_in_chunks_and_in_a_batch(
    precision: str, dtype: torch.dtype
) -> None:
    block = loud_block(heads=2, width=128, inner=100, dtype=dtype)
    kernels.pack_model(block, precision)
    h = torch.randn(3, 50, 128).to(dtype)
    whole = run(block, h, empty_cache(h, 2, slots=50), positions_of(h))
    for chunk in (1, 7, 33):
        cache = empty_cache(h[1:2], 2)
        for begin in range(0, 50, chunk):
            part = h[1:2, begin : begin + chunk]
            found = run(block, part, cache, positions_of(part, begin))
            assert torch.equal(found, whole[1:2, begin : begin + chunk])
        assert cache.keys[:, 50:].isnan().all()


@needs_kernels
def test_rows_may_stand_at_different_positions_and_the_cache_in_strided_memory() -> None:
    block = loud_block(heads=2, width=128, inner=100)
    kernels.pack_model(block, "float32")
    h = torch.randn(2, 1, 128)
    filled = torch.randn(2, 2, 2 * SLOTS, 2, 64)[:, :, ::2]
    together = KeysValues(*filled.clone().unbind(0))
    strided = KeysValues(*filled.unbind(0))
    positions = torch.tensor([[5], [39]])
    found = run(block, h, strided, positions)
    assert torch.equal(found, run(block, h, together, positions))
    for row in range(2):
        cache = KeysValues(together.keys[row : row + 1], together.values[row : row + 1])
        alone = run(block, h[row : row + 1], cache, positions[row : row + 1])
        assert torch.equal(alone, found[row : row + 1])


@needs_kernels
def test_a_position_outside_the_cache_is_an_error() -> None:
    block = loud_block(heads=1, width=16, inner=16)
    kernels.pack_model(block, "float32")
    h = torch.randn(1, 1, 16)
    for position in (-1, 4):
        with pytest.raises(RuntimeError, match="outside the cache of 4 slots"):
            run(block, h, empty_cache(h, 1, slots=4), torch.tensor([[position]]))


@needs_kernels
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_operator_is_declared_as_it_behaves(precision: str) -> None:
    block = loud_block(heads=2, width=32, inner=50)
    kernels.pack_model(block, precision)
    h = torch.randn(1, 2, 32)
    cache = KeysValues(*(t.nan_to_num() for t in empty_cache(h, 2)))
    values = arguments(block, h, cache, positions_of(h).contiguous())
    operator = torch.ops.gpt2ml.packed_layers.default
    torch.library.opcheck(operator, (*values.values(), [], None))
    kinds = {"attention.qkv": (96, 32), "mlp.up": (50, 32)}
    changes = {
        f"blocks.0.{kind}": kernels.LowRank(torch.randn(3, inputs), torch.randn(outputs, 3))
        for kind, (outputs, inputs) in kinds.items()
    }
    adapter = kernels.PackedAdapter.pack(
        changes, shapes=kinds, layers=1, precision=Precision.FLOAT32
    )
    torch.library.opcheck(
        operator, (*values.values(), list(adapter.matrices), torch.zeros(1, dtype=torch.int64))
    )


def ids_and_cache(config: GPT2MLConfig) -> tuple[Tensor, KVCache]:
    ids = torch.randint(0, config.vocab_size, (2, 9))
    return ids, KVCache(config, batch_size=2, length=config.max_position_embeddings)


@needs_kernels
def test_a_model_over_its_cache_is_the_model_without() -> None:
    model = loud_model(KERNEL_CONFIG)
    ids, cache = ids_and_cache(KERNEL_CONFIG)
    expected = model.double()(ids)
    kernels.pack_model(model.float(), "float32")
    torch.testing.assert_close(model(ids, cache=cache).double(), expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_it_compiles_in_one_graph_and_fills_the_cache() -> None:
    # float32, because an int8 input on the edge between two steps may compile to the other one
    model = kernels.pack_model(loud_model(KERNEL_CONFIG), "float32")
    ids, eager = ids_and_cache(KERNEL_CONFIG)
    compiled = KVCache(KERNEL_CONFIG, batch_size=2, length=eager.length)
    step = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(step(ids, cache=compiled), model(ids, cache=eager))
    torch.testing.assert_close(compiled.keys, eager.keys)
    torch.testing.assert_close(compiled.values, eager.values)


@needs_kernels
def test_what_the_kernel_does_not_support_runs_on_pytorch() -> None:
    heads_of_24 = {"hidden_size": 48, "num_attention_heads": 2}
    config = dataclasses.replace(KERNEL_CONFIG, **heads_of_24)
    model = loud_model(config)
    ids, cache = ids_and_cache(config)
    expected = model(ids)
    kernels.pack_model(model, "float32")
    torch.testing.assert_close(model(ids, cache=cache), expected, rtol=1e-4, atol=1e-5)
