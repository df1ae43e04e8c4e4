"""Make a model file's tensors from a checkpoint's: read, join, transpose and round.

A few threads make one tensor each at a time and pass it to a `Sink`: `convert.to_safetensors`
writes the tensors, and `convert.comparison` compares them with a file's."""

from __future__ import annotations

import collections
import concurrent.futures
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from convert.mapping import Recipe
from convert.plan import TensorPlan
from convert.source import (
    Array,
    Source,
    count_non_finite,
    round_to,
    rows_in_order,
    storage_dtype,
)
from gpt2ml_torch.modelfile.format import SLOT
from gpt2ml_torch.options import OptionError

if TYPE_CHECKING:
    from torch import Tensor

_WORKERS = 2  # more would only wait, since the system lets one thread at a time write to a file

Progress = Callable[[int, int], None]  # bytes done since the last call, bytes in all
# Takes a tensor's name in the file and its rows in pieces, each of which is valid until the next is
# taken (`rows_in_order`). It is called in several threads, and need not take all pieces.
Sink = Callable[[str, Iterator[Array]], None]


class Order(NamedTuple):
    """One tensor to make: its name in the file, its recipe, and its dtype before packing."""

    name: str
    recipe: Recipe
    dtype: str


class UnstorableError(OptionError):
    """A tensor has finite values that its dtype can't hold."""


def orders(plan: TensorPlan, dtype: str) -> list[Order]:
    """All tensors of a plan; the optimizer's statistics are always float32."""
    weights = [Order(key, recipe, dtype) for key, recipe in plan.recipes.items()]
    return weights + [Order(SLOT + key, recipe, "float32") for key, recipe in plan.slots.items()]


def make_tensors(
    source: Source,
    wanted: Iterable[Order],
    sink: Sink,
    *,
    allow_non_finite: bool,
    progress: Progress | None = None,
) -> list[str]:
    """Make tensors and pass each to the sink; the first that fails stops the others.

    Returns a note on each tensor that is not finite, if that is allowed. Raises `ValueError` for
    a tensor that is damaged or not finite, `UnstorableError`, and the exceptions of the sink.
    """
    jobs = collections.deque(wanted)
    sizes = {order.name: _bytes_made(source, order) for order in jobs}
    total = sum(sizes.values())
    reporting = threading.Lock()
    notes: list[str] = []

    def work() -> None:
        while jobs:
            try:
                order = jobs.popleft()
            except IndexError:  # another thread took the last one
                return
            maker = _Maker(source, order, allow_non_finite=allow_non_finite)
            sink(order.name, maker.pieces())
            if maker.non_finite:
                notes.append(
                    f"tensor {order.name!r} has {maker.non_finite:,} numbers that are not finite"
                )
            if progress:
                with reporting:
                    progress(sizes[order.name], total)

    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        workers = [pool.submit(work) for _ in range(_WORKERS)]
        try:
            for worker in concurrent.futures.as_completed(workers):
                worker.result()
        finally:
            jobs.clear()
    return sorted(notes)


def whole(pieces: Iterator[Array], dtype: str) -> Tensor:
    """All pieces together as a PyTorch tensor in its own memory."""
    import torch  # takes seconds to import, and only packing needs it

    joined = torch.from_numpy(np.concatenate(list(map(np.copy, pieces))))
    return joined.view(torch.bfloat16) if dtype == "bfloat16" else joined


def _bytes_made(source: Source, order: Order) -> int:
    numbers = sum(math.prod(source.tensors[name].shape) for name in order.recipe.sources)
    return numbers * storage_dtype(order.dtype).itemsize


class _Maker:
    """Makes one tensor of the file from the source's, and counts its non-finite values."""

    def __init__(self, source: Source, order: Order, *, allow_non_finite: bool) -> None:
        self._source, self._order, self._allow = source, order, allow_non_finite
        self.non_finite = 0

    def pieces(self) -> Iterator[Array]:
        """Some rows at a time, checked while they are in the processor's cache."""
        recipe = self._order.recipe
        for name in recipe.sources:
            tensor = self._source.read(name)
            for rows in rows_in_order(tensor.T if recipe.transpose else tensor):
                self.non_finite += (found := count_non_finite(rows))
                if found and not self._allow:
                    raise OptionError(
                        "tensor {!r} of {} has numbers that are not finite (NaN or infinity): "
                        "such a model writes nothing sensible; fetch or train it again "
                        "({allow_non_finite=True} converts it all the same)",
                        *(name, self._source.name),
                    )
                yield self._rounded(rows)

    def _rounded(self, rows: Array) -> Array:
        try:
            return round_to(self._order.dtype, rows)
        except ValueError as error:
            raise UnstorableError(
                "tensor {!r} has {}; choose {dtype=float32} or bfloat16", self._order.name, error
            ) from None
