"""LoRA adapters beside packed weights: what each row's adapter adds to a layer's products.

An adapter's change of a weight, a matrix of low rank, is not added to the weight but multiplied
apart, so that rows with different adapters share one packed model and one step.

Shapes:
    L  layers       B  batch rows       N, K  outputs and inputs of a linear layer       r  rank
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch.kernels.ops import pack_rows
from gpt2ml_torch.kernels.packing import empty_in_huge_pages, storage_dtype
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.precision import PANEL, Precision

LINEAR_LAYERS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")  # of a block
NO_ADAPTER = -1


class LowRank(NamedTuple):
    """The factors of one change in plain form: `wide` (N, r) @ `narrow` (r, K) is added."""

    narrow: Tensor
    wide: Tensor


@dataclasses.dataclass(frozen=True)
class PackedAdapter:
    """The packed factors of an adapter: for each of `LINEAR_LAYERS` the narrow matrix and the wide
    one of all layers, (L, ...), or two empty tensors where the adapter changes nothing.
    """

    matrices: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    @classmethod
    def pack(
        cls,
        changes: Mapping[str, LowRank],
        *,
        shapes: Mapping[str, tuple[int, int]],
        layers: int,
        precision: Precision,
    ) -> PackedAdapter:
        """Pack changes by the name of the linear layer, such as `blocks.3.mlp.up`.

        `shapes` has (N, K) of each of `LINEAR_LAYERS`. Layers without a change, and ranks below the
        largest of a kind, are filled with zeros.
        """
        matrices: list[Tensor] = []
        for kind in LINEAR_LAYERS:
            found = [changes.get(f"blocks.{layer}.{kind}") for layer in range(layers)]
            rank = max((len(change.narrow) for change in found if change is not None), default=0)
            if not rank:
                matrices += torch.empty(0), torch.empty(0)
                continue
            rank = -(-rank // PANEL) * PANEL
            outputs, inputs = shapes[kind]
            narrow, wide = torch.zeros(layers, rank, inputs), torch.zeros(layers, outputs, rank)
            for layer, change in enumerate(found):
                if change is not None:
                    own = len(change.narrow)
                    narrow[layer, :own] = change.narrow
                    wide[layer, :, :own] = change.wide
            for factor in (narrow, wide):
                matrices.append(_packed(factor, precision))
        return cls(tuple(matrices))


class RowAdapters(NamedTuple):
    """Adapters, and which one each row of a cache is read and written with."""

    adapters: tuple[PackedAdapter, ...]
    of_rows: Tensor  # (B,) int64: an index of `adapters`, or `NO_ADAPTER`

    def rows(self, start: int, end: int) -> RowAdapters:
        """Of the rows from `start` to before `end`, as a view."""
        return self._replace(of_rows=self.of_rows[start:end])

    @property
    def matrices(self) -> list[Tensor]:
        """As the operator takes them; none where no row has an adapter."""
        if not bool((self.of_rows != NO_ADAPTER).any()):
            return []
        return [matrix for adapter in self.adapters for matrix in adapter.matrices]


class Adapters:
    """The adapters of one model by name."""

    def __init__(self) -> None:
        self._packed: dict[str, PackedAdapter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._packed)

    def add(self, name: str, adapter: PackedAdapter) -> None:
        """Raises `ValueError` for a name in use."""
        if name in self._packed:
            raise ValueError(f"there is an adapter {name!r} already; give another name")
        self._packed[name] = adapter

    def number(self, name: str | None) -> int:
        """What rows call an adapter; None is `NO_ADAPTER`. Raises `ValueError` for another name."""
        if name is None:
            return NO_ADAPTER
        if name not in self._packed:
            known = ", ".join(map(repr, self._packed)) or "none"
            raise OptionError("{adapter} is {!r}; the generator has {}", name, known)
        return self.names.index(name)

    @torch.inference_mode()
    def of_rows(self, rows: int, name: str | None = None) -> RowAdapters | None:
        """For so many rows, all with one adapter; None where there is no adapter at all."""
        if not self._packed:
            return None
        return RowAdapters(tuple(self._packed.values()), torch.full((rows,), self.number(name)))


def _packed(matrices: Tensor, precision: Precision) -> Tensor:
    """(L, N, K) -> (L, ...), each matrix packed."""
    shape = precision.packed_shapes(*matrices.shape[1:]).weight
    packed = empty_in_huge_pages((len(matrices), *shape), storage_dtype(precision))
    for place, matrix in zip(packed, matrices, strict=True):
        pack_rows(matrix, place, None, precision, first=0)
    return packed
