"""What the TensorFlow reference computes: live where TensorFlow is installed, and elsewhere from
tests/golden.

A test asks a `Case` for results and does not see where they come from. Cases that tests/golden
lacks are skipped where TensorFlow is absent. Setting GPT2ML_REFERENCE=golden takes the files where
TensorFlow is installed too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.weights import (
    Array,
    Sizes,
    Weights,
    adafactor_slots,
    short_weights,
    weight_shapes,
)

FOLDER = Path(__file__).resolve().parent.parent / "golden"
ROWS = 3
LOW_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with loud weights that every dtype holds exactly, and token ids for it."""

    sizes: Sizes
    seed: int = 0

    def __str__(self) -> str:
        name = golden_name(self)
        return name or "-".join(str(value) for value in dataclasses.astuple(self.sizes))

    @property
    def weights(self) -> Weights:
        """Float32 weights under their published names."""
        return dict(_weights(self))

    @property
    def ids(self) -> Array:
        """(3, positions + 1), with both ends of the vocabulary, and pads in the middle of a row, at
        the end of one and after a short one.
        """
        sizes = self.sizes
        ids = np.random.default_rng(self.seed).integers(0, sizes.vocab, (ROWS, sizes.positions + 1))
        ids[0, :2] = sizes.vocab - 1, 0
        ids[1, 9:] = 0
        ids[2, -2:] = 0
        return ids

    def logits(self, dtype: str = "float64") -> Array:
        """Of the ids without the last column, (3, positions, vocab)."""
        return _results(self, "logits", dtype)["logits"]

    def cached_logits(self) -> Array:
        """The same, through the reference's own cache: five tokens at once, then one by one."""
        return _results(self, "cached", "float64")["logits"]

    def loss_and_gradients(self, dtype: str = "float64") -> tuple[float, Weights]:
        """Mean cross entropy over next tokens that are not 0, and its gradient for each weight."""
        results = dict(_results(self, "gradients", dtype))
        return float(results.pop("loss")), results

    def adafactor_step(self) -> Weights:
        """Weights and slots after one step of the original's Adafactor with the float64 gradients,
        at a learning rate of 1e-2 and from slots of 0.
        """
        return dict(_results(self, "adafactor", "float64"))


# Sizes no two dimensions of which agree; many layers; the published head size; and one where every
# kernel is square and every vector as long as any other, so that no shape check helps.
GOLDEN = {
    "odd": Case(Sizes(layers=3, width=30, heads=3, mlp=50, vocab=101, positions=24)),
    "deep": Case(Sizes(layers=48, width=9, heads=3, mlp=11, vocab=31, positions=17)),
    "heads-of-64": Case(Sizes(layers=1, width=128, heads=2, mlp=24, vocab=41, positions=21)),
    "square": Case(Sizes(layers=3, width=24, heads=3, mlp=24, vocab=59, positions=23)),
}
# What the files hold of each.
_EVERYTHING = [("cached", "float64"), ("gradients", "float64"), ("adafactor", "float64")]
_EVERYTHING += [("logits", dtype) for dtype in ("float64", *LOW_DTYPES)]
HELD = {
    "odd": _EVERYTHING,
    "deep": [("logits", "float64"), ("gradients", "float64")],
    "heads-of-64": [("logits", "float64"), ("gradients", "float64")],
    "square": [("logits", "float64")],
}


def golden_name(case: Case) -> str | None:
    """The name of a case that tests/golden holds."""
    return next((name for name, value in GOLDEN.items() if value == case), None)


def is_live() -> bool:
    """Whether results come from TensorFlow in this process."""
    wanted = os.environ.get("GPT2ML_REFERENCE") != "golden"
    return wanted and importlib.util.find_spec("tensorflow") is not None


def layout(case: Case, what: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each array of a result, in the order in which a file holds them."""
    sizes, weights = case.sizes, weight_shapes(case.sizes)
    if what in ("logits", "cached"):
        return {"logits": (ROWS, sizes.positions, sizes.vocab)}
    if what == "gradients":
        return {"loss": (), **weights}
    return {**weights, **dict(adafactor_slots(weights))} if what == "adafactor" else weights


def joined(arrays: Weights, case: Case, what: str) -> Array:
    """All arrays in one, since a name apiece would take as much room as a small array."""
    assert arrays.keys() == layout(case, what).keys()
    return np.concatenate([arrays[name].ravel() for name in layout(case, what)])


def golden(name: str, what: str, dtype: str) -> Weights | None:
    """A result from tests/golden by the names of its arrays, or the case's "weights"."""
    shapes = layout(GOLDEN[name], what)
    with np.load(FOLDER / f"{name}.npz") as file:
        if f"{what}/{dtype}" not in file:
            return None
        whole = file[f"{what}/{dtype}"]
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(whole, ends[:-1])
    return {
        key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)
    }


@functools.cache
def _weights(case: Case) -> Weights:
    name = golden_name(case)
    stored = None if name is None or is_live() else golden(name, "weights", "float16")
    if stored is None:
        return short_weights(case.sizes, seed=case.seed)
    return {key: value.astype(np.float32) for key, value in stored.items()}


@functools.cache
def _results(case: Case, what: str, dtype: str) -> Weights:
    if is_live():
        from tests.tf_reference import results  # TensorFlow takes seconds

        return results(case, what, dtype)
    name = golden_name(case)
    found = None if name is None else golden(name, what, dtype)
    if found is None:
        pytest.skip(f"needs TensorFlow: tests/golden has no {dtype} {what} of {case.sizes}")
    return found
