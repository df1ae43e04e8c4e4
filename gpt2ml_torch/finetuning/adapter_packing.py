"""Load a LoRA adapter that is multiplied beside packed weights, instead of being merged."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch

from gpt2ml_torch.finetuning.adapter_config import listed
from gpt2ml_torch.finetuning.adapters import (
    Adapter,
    WeightChange,
    places_of,
    read_adapter,
    weight_changes,
)
from gpt2ml_torch.kernels import LINEAR_LAYERS, LowRank, PackedAdapter
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile.format import expected_shapes
from gpt2ml_torch.precision import Precision

logger = logging.getLogger(__name__)


def load_adapter(folder: str | os.PathLike[str], model: GPT2ML) -> PackedAdapter:
    """Read an adapter's folder for `Generator.add_adapter`; `model` is the one it was trained on.

    Its matrices are packed in bfloat16, or in float32 beside float32 weights. Raises `OSError` for
    a folder that is no adapter, and `ValueError` for an adapter that is damaged, does not fit the
    model, or changes more than its linear layers (DoRA, biases, embeddings, `modules_to_save`):
    such an adapter can only be merged.
    """
    return pack_adapter(read_adapter(folder), model)


def pack_adapter(adapter: Adapter, model: GPT2ML) -> PackedAdapter:
    """As `load_adapter`, of an adapter that was read already."""
    try:
        changes = weight_changes(adapter, places_of(adapter, model.config))
        factors = _factors(changes, expected_shapes(model.config))
    except ValueError as error:
        raise ValueError(f"the adapter {adapter.folder} can't be added: {error}") from None
    if not any(change.has_effect for each in changes.values() for change in each):
        logger.warning("the adapter %s adds nothing: all its products are zero", adapter.folder)
    return PackedAdapter.pack(
        factors,
        shapes={kind: _shape(model, kind) for kind in LINEAR_LAYERS},
        layers=model.config.num_hidden_layers,
        precision=Precision.FLOAT32 if model.packed is Precision.FLOAT32 else Precision.BFLOAT16,
    )


def _shape(model: GPT2ML, kind: str) -> tuple[int, int]:
    rows, columns = expected_shapes(model.config)[f"blocks.0.{kind}.weight"]
    return rows, columns


def _factors(
    changes: Mapping[str, Sequence[WeightChange]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LowRank]:
    """The factors of each linear layer's change, by the layer's name."""
    linear = tuple(f".{kind}.weight" for kind in LINEAR_LAYERS)
    others = [
        name
        for name, each in changes.items()
        if not name.endswith(linear)
        or any(change.a is None or change.replacement is not None for change in each)
        or any(change.magnitude is not None for change in each)
    ]
    if others:
        raise ValueError(
            f"it changes {listed(sorted(others))} by more than a product of low rank; merge it "
            "into the model instead (gpt2ml merge)"
        )
    return {
        name.removesuffix(".weight"): _joined(each, rows=shapes[name][0])
        for name, each in changes.items()
    }


def _joined(changes: Sequence[WeightChange], *, rows: int) -> LowRank:
    """One change that stands for several, each of other rows of the weight. The exported class has
    query, key and value apart, so its adapters change the joined matrix in three parts.
    """
    narrow = torch.cat([change.a for change in changes if change.a is not None])
    wide = torch.zeros(rows, len(narrow))
    first = 0
    for change in changes:
        assert change.b is not None
        end = first + change.b.shape[1]
        place = slice(change.first_row, change.first_row + change.rows)
        wide[place, first:end] = change.scale * change.b
        first = end
    return LowRank(narrow, wide)
