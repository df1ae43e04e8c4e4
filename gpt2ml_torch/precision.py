"""Precision: how numbers are stored, from float64 down to 4-bit integers.

The converter, the loader, the kernels, the engine and the command line all use this type. PyTorch
is imported only if a dtype is needed, because the converter runs without it.

Shapes:
    N  outputs, padded to a multiple of 16      K  inputs, padded to a multiple of 32
    P  panels, N / 16                           G  groups of inputs
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

PANEL = 16  # rows of a packed weight that are stored together; a vector holds a step of 16 outputs
MULTIPLE = 32  # inputs of a packed weight are padded to a multiple of this


class PackedShapes(NamedTuple):
    """Shapes of a packed weight and of its scale (`None` for floating-point weights)."""

    weight: tuple[int, ...]
    scale: tuple[int, ...] | None


class Precision(str, enum.Enum):
    """A storage format for numbers; a member equals its name, as in `Precision.INT8 == "int8"`."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def of(cls, value: Any) -> Precision:
        """The precision of a name or of a `torch.dtype`; raises `ValueError` for any other."""
        try:
            return cls(str(value).removeprefix("torch."))
        except ValueError:
            expected = ", ".join(cls)
            raise ValueError(f"precision is {value!r}; expected one of {expected}") from None

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def is_integer(self) -> bool:
        """Whether weights are rounded to integers, with a scale for each group of inputs."""
        return self.group is not None

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; `None` for floating point."""
        return {Precision.INT8: 128, Precision.INT4: 32}.get(self)

    @property
    def of_embedding(self) -> Precision:
        """The token embedding's precision beside matrices of this one.

        It has at least 8 bits, since the embedding is the output layer too.
        """
        return Precision.INT8 if self is Precision.INT4 else self

    @property
    def dtype(self) -> torch.dtype:
        """The `torch.dtype` of such numbers; raises `ValueError` for integers, which are packed."""
        import torch

        if self.is_integer:
            raise ValueError(f"{self} weights are packed; PyTorch has no dtype for them")
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype

    def packed_shapes(self, outputs: int, inputs: int) -> PackedShapes:
        """Shapes of a weight (outputs, inputs) once packed; see `gpt2ml_torch.kernels.packing`.

        Floating point: (P, K / n, 16, n), n numbers of a row together. Integers: bytes,
        (P, K * bits / 32, 16, 4), with bfloat16 scales (P, G, 16). Raises `ValueError` for float64,
        which no kernel reads.
        """
        if self not in PACKABLE:
            raise ValueError(f"weights in {self.value!r}; expected one of {', '.join(PACKABLE)}")
        panels, padded = -(-outputs // PANEL), -(-inputs // MULTIPLE) * MULTIPLE
        if self.group is None:
            together = 2 if self is Precision.BFLOAT16 else 1
            return PackedShapes((panels, padded // together, PANEL, together), None)
        groups = -(-padded // self.group)
        return PackedShapes((panels, padded * self.bits // 32, PANEL, 4), (panels, groups, PANEL))


_BITS = {
    Precision.FLOAT64: 64,
    Precision.FLOAT32: 32,
    Precision.BFLOAT16: 16,
    Precision.FLOAT16: 16,
    Precision.INT8: 8,
    Precision.INT4: 4,
}

FLOATING = tuple(precision for precision in Precision if not precision.is_integer)
INTEGER = tuple(precision for precision in Precision if precision.is_integer)
PACKABLE = tuple(precision for precision in Precision if precision is not Precision.FLOAT64)
