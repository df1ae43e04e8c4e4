"""Adapters beside packed weights: each row has its own, and what it writes depends on no other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML, KVCache, kernels
from gpt2ml_torch.kernels import LINEAR_LAYERS, LowRank, PackedAdapter, RowAdapters
from gpt2ml_torch.precision import PACKABLE, Precision
from tests.helpers.tiny import KERNEL_CONFIG, loud_model

SHAPES = {
    "attention.qkv": (192, 64),
    "attention.output": (64, 64),
    "mlp.up": (100, 64),
    "mlp.down": (64, 100),
}
pytestmark = [
    pytest.mark.skipif(not kernels.load_kernels(), reason="no compiler or no AVX2"),
    pytest.mark.usefixtures("one_thread"),
]


def changes_of(
    seed: int, *, rank: int, kinds: tuple[str, ...] = LINEAR_LAYERS
) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{layer}.{kind}": LowRank(
            torch.randn(rank + layer, SHAPES[kind][1], generator=draw) / 8,
            torch.randn(SHAPES[kind][0], rank + layer, generator=draw) / 8,
        )
        for layer in range(KERNEL_CONFIG.num_hidden_layers)
        for kind in kinds
    }


def packed(changes: dict[str, LowRank], precision: Precision = Precision.FLOAT32) -> PackedAdapter:
    layers = KERNEL_CONFIG.num_hidden_layers
    return PackedAdapter.pack(changes, shapes=SHAPES, layers=layers, precision=precision)


CHANGES = (
    changes_of(1, rank=3),
    changes_of(2, rank=17, kinds=("attention.qkv", "mlp.down")),
    {"blocks.1.mlp.up": changes_of(3, rank=40)["blocks.1.mlp.up"]},
)


@pytest.fixture(scope="module")
def plain() -> GPT2ML:
    torch.manual_seed(0)
    return loud_model(KERNEL_CONFIG)


def read(model: GPT2ML, ids: Tensor, of_rows: list[int], *, parts: tuple[int, ...] = ()) -> Tensor:
    """Logits of rows with adapters, read in parts of these sizes."""
    cache = KVCache(KERNEL_CONFIG, batch_size=len(ids), length=32, dtype=model.dtype)
    cache.adapters = RowAdapters(tuple(map(packed, CHANGES)), torch.tensor(of_rows))
    logits, start = [], 0
    with torch.inference_mode():
        for size in parts or (ids.shape[1],):
            positions = torch.arange(start, start + size).expand(len(ids), size)
            logits.append(
                model(
                    ids[:, start : start + size].clone(), positions=positions.clone(), cache=cache
                )
            )
            start += size
    return torch.cat(logits, dim=1)


def test_each_row_is_what_the_merged_model_gives_in_float64(plain: GPT2ML) -> None:
    """Within twice float32's own error on merged weights, plus one rounding of the result."""
    ids = torch.randint(0, 50, (4, 20), generator=torch.Generator().manual_seed(1))
    found = read(kernels.pack_model(copy.deepcopy(plain), "float32"), ids, [0, 1, 2, -1])
    for row, changes in enumerate((*CHANGES, {})):
        merged = copy.deepcopy(plain).double()
        with torch.no_grad():
            for name, change in changes.items():
                weight = merged.get_parameter(f"{name}.weight")
                weight.add_(change.wide.double() @ change.narrow.double())
        with torch.inference_mode():
            expected = merged(ids[row : row + 1])[0]
            own = merged.float()(ids[row : row + 1])[0]
        error, bound = (found[row] - expected).norm(), (own - expected).norm()
        assert error <= 2 * bound + torch.finfo(torch.float32).eps * expected.norm()
        assert row == 3 or (found[row] - read_plain(plain, ids[row])).abs().max() > 0.1


def read_plain(plain: GPT2ML, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return plain(ids[None])[0]


@pytest.mark.parametrize("precision", PACKABLE)
def test_a_row_is_the_same_alone_in_parts_and_beside_others(
    plain: GPT2ML, precision: Precision
) -> None:
    model = kernels.pack_model(copy.deepcopy(plain), precision)
    ids = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(2))
    of_rows = [0, -1, 1, 2, 0, -1]
    together = read(model, ids, of_rows)
    for row, adapter in enumerate(of_rows):
        for parts in ((24,), (1, 7, 16)):
            alone = read(model, ids[row : row + 1], [adapter], parts=parts)
            assert torch.equal(alone[0], together[row]), (row, parts)


@pytest.mark.parametrize("precision", PACKABLE)
def test_a_row_without_an_adapter_is_what_it_is_without_any(
    precision: Precision, plain: GPT2ML
) -> None:
    ids = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(3))
    model = kernels.pack_model(copy.deepcopy(plain), precision)
    cache = KVCache(KERNEL_CONFIG, batch_size=2, length=32)
    with torch.inference_mode():
        expected = model(ids, cache=cache)
    assert torch.equal(read(model, ids, [-1, 0])[0], expected[0])


def test_rows_take_their_adapter_along(plain: GPT2ML) -> None:
    cache = KVCache(KERNEL_CONFIG, batch_size=3, length=8)
    cache.adapters = RowAdapters((packed(CHANGES[0]),) * 2, torch.tensor([-1, -1, -1]))
    cache.use_adapter(0, 1)
    cache.copy_row(0, cache, 2, 1)
    part = cache.rows(2, 3)
    assert part.adapters is not None
    assert part.adapters.of_rows.tolist() == [1]
    cache.use_adapter(2, 0)
    assert part.adapters.of_rows.tolist() == [0]


def test_an_adapter_that_is_not_there_is_an_error(plain: GPT2ML) -> None:
    model = kernels.pack_model(copy.deepcopy(plain), "float32")
    cache = KVCache(KERNEL_CONFIG, batch_size=1, length=8)
    for adapters in ((), (packed(CHANGES[0]),)):
        with pytest.raises(ValueError, match=f"no adapter 1; it has {len(adapters)}"):
            cache.use_adapter(0, 1)
        cache.adapters = RowAdapters((packed(CHANGES[0]),), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="there is no adapter 1"), torch.inference_mode():
        model(torch.tensor([[1]]), cache=cache)


def test_matrices_that_do_not_fit_are_an_error(plain: GPT2ML) -> None:
    model = kernels.pack_model(copy.deepcopy(plain), "float32")
    fewer = PackedAdapter.pack(CHANGES[0], shapes=SHAPES, layers=2, precision=Precision.FLOAT32)
    narrow = SHAPES | {"mlp.up": (100, 32)}
    other = {"blocks.0.mlp.up": LowRank(torch.ones(2, 32), torch.ones(100, 2))}
    smaller = PackedAdapter.pack(other, shapes=narrow, layers=3, precision=Precision.FLOAT32)
    for adapter, message in ((fewer, "a matrix for each layer"), (smaller, "not packed for")):
        cache = KVCache(KERNEL_CONFIG, batch_size=1, length=8)
        cache.adapters = RowAdapters((adapter,), torch.tensor([0]))
        with pytest.raises(RuntimeError, match=message), torch.inference_mode():
            model(torch.tensor([[1]]), cache=cache)


def test_a_model_that_is_not_packed_refuses_adapters(plain: GPT2ML) -> None:
    cache = KVCache(KERNEL_CONFIG, batch_size=1, length=8)
    cache.adapters = RowAdapters((packed(CHANGES[0]),), torch.tensor([0]))
    with pytest.raises(ValueError, match="adapters are added by the kernels"):
        plain(torch.tensor([[1]]), cache=cache)
