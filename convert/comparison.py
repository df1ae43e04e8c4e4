"""Compare a model file with the checkpoint that it was made from, bit for bit.

Its tensors are made again, but not written: memory holds a few rows of each tensor, or one packed
matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.inputs import Location
from convert.plan import OptimizerError, TensorPlan, plan_tensors
from convert.source import Array, Source, rows_in_order
from convert.tensors import UnstorableError, make_tensors, orders, whole
from convert.to_safetensors import open_source
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import (
    SCALE,
    SLOT,
    expected_slots,
    expected_tensors,
    packed_precision,
)


def differing_tensors(file: ModelFile, location: Location) -> list[str]:
    """The sorted names of the tensors that differ from the checkpoint's in the file's precision.

    They have another dtype, shape or content, or are in only one of the two. The optimizer's
    statistics are compared if the file keeps them; NaN equals NaN of the same bits. A configuration
    beside the checkpoint is not read, since the shapes of the tensors suffice. Raises `ValueError`
    for a checkpoint that is damaged or not a complete model, and for a file that changes meanwhile,
    and `OSError` if one can't be read.
    """
    source = open_source(location)
    plan = _plan(source, optimizer=bool(file.slots))
    expected = expected_tensors(plan.config, file.dtype, file.packed)
    if plan.slots:
        expected |= expected_slots(plan.config)
    found = file.tensors | {SLOT + name: info for name, info in file.slots.items()}
    differing = [
        name
        for name in expected.keys() | found.keys()
        if name not in expected
        or name not in found
        or expected[name] != (found[name].dtype, found[name].shape)
    ]
    wanted = [order for order in orders(plan, str(file.dtype)) if order.name not in differing]

    def compare(name: str, pieces: Iterator[Array]) -> None:
        try:
            made = _pack(file, name, pieces) if name + SCALE in found else {name: pieces}
            differing.extend(key for key, rows in made.items() if not _is_stored(rows, file, key))
        except UnstorableError:
            differing.append(name)

    make_tensors(source, wanted, compare, allow_non_finite=True)
    source.verify_rest()
    file.check_unchanged()
    return sorted(name.removeprefix(SLOT) for name in differing)


def _plan(source: Source, *, optimizer: bool) -> TensorPlan:
    """The plan of the tensors, without the optimizer if the checkpoint lacks a part of it."""
    try:
        return plan_tensors(source, keep_optimizer=optimizer)
    except OptimizerError:
        return plan_tensors(source, keep_optimizer=False)


def _pack(file: ModelFile, name: str, pieces: Iterator[Array]) -> dict[str, Iterator[Array]]:
    """A packed weight and its scale as the file stores them, each in pieces.

    Raises `UnstorableError` for what can't be packed.
    """
    import torch

    from gpt2ml_torch import kernels  # brings PyTorch too

    precision = packed_precision(name, file.packed)
    assert precision is not None
    whole_weight = whole(pieces, file.dtype)
    try:
        weight, scale = kernels.pack(whole_weight, precision)
    except ValueError as error:
        raise UnstorableError("tensor {!r}: {}", name, error) from None
    assert scale is not None
    made = {name: weight, name + SCALE: scale}
    return {
        key: rows_in_order(tensor.view(-1).view(torch.uint8).numpy())
        for key, tensor in made.items()
    }


def _is_stored(pieces: Iterator[Array], file: ModelFile, name: str) -> bool:
    """Whether the file's tensor `name`, which has the same size, consists of these bytes."""
    buffer, start = bytearray(), 0
    for piece in pieces:
        if len(buffer) < piece.nbytes:
            buffer = bytearray(piece.nbytes)
        view = memoryview(buffer)[: piece.nbytes]
        file.read_into(view, name, start)
        bits = f"u{piece.itemsize}"  # since NaN is not equal to itself
        if not np.array_equal(np.frombuffer(view, bits), piece.reshape(-1).view(bits)):
            return False
        start += piece.nbytes
    return True
