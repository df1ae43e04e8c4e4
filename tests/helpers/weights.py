"""Random weights of GPT2_ML under their published names, made without TensorFlow or PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]

SCOPE = "newslm"
DENSE = (
    "query_layer",
    "key_layer",
    "value_layer",
    "context_projection_layer",
    "intermediate",
    "output",
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model; the defaults are odd on purpose, so that no two dimensions can be
    confused.
    """

    layers: int = 3
    width: int = 36
    heads: int = 3
    mlp: int = 100
    vocab: int = 211
    positions: int = 40


def weight_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of each weight, optimizer slots left out."""
    D, M = sizes.width, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {
        f"{SCOPE}/embeddings/word_embed": (sizes.vocab, D),
        f"{SCOPE}/embeddings/pos_embed": (sizes.positions, D),
        f"{SCOPE}/embeddings/LayerNorm_embed_norm/gamma": (D,),
        f"{SCOPE}/embeddings/LayerNorm_embed_norm/beta": (D,),
    }
    for index in range(sizes.layers):
        layer = f"{SCOPE}/layer{index:02d}"
        for name in DENSE:
            rows, columns = {"intermediate": (D, M), "output": (M, D)}.get(name, (D, D))
            shapes[f"{layer}/{name}/kernel"] = (rows, columns)
            shapes[f"{layer}/{name}/bias"] = (columns,)
        for name in ("LayerNorm_mlp_ln0", "LayerNorm_mlp_ln1"):
            shapes[f"{layer}/{name}/gamma"] = (D,)
            shapes[f"{layer}/{name}/beta"] = (D,)
    return shapes


def adafactor_slots(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each optimizer slot: factored for matrices, no momentum."""
    for name, shape in shapes.items():
        if len(shape) == 2:
            yield f"{name}/adafactor_vr", shape[:1]
            yield f"{name}/adafactor_vc", shape[1:]
        else:
            yield f"{name}/adafactor_v", shape


def loud_weights(sizes: Sizes, *, seed: int = 0) -> Weights:
    """Random float32 weights that hide nothing: activations near 1, no gamma of 1, no beta or bias
    of 0.

    At the published initializer (std 0.014) the two kinds of gelu agree within 3e-7; here they do
    not.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        noise = rng.standard_normal(shape)
        if name.endswith("_embed"):
            noise *= 0.25
        elif name.endswith("gamma"):
            noise = 1 + 0.3 * noise
        elif name.endswith(("beta", "bias")):
            noise *= 0.3
        else:
            sharper = 1.5 if "query" in name or "key" in name else 1.0  # uneven attention
            noise *= sharper / math.sqrt(shape[0])
        return noise.astype(np.float32)

    return {name: draw(name, shape) for name, shape in weight_shapes(sizes).items()}


def short_weights(sizes: Sizes, *, seed: int = 0) -> Weights:
    """Loud weights of so few bits that float16 and bfloat16 hold them exactly: one float64 result
    is then the truth for every dtype.
    """
    return {name: _shorten(weight) for name, weight in loud_weights(sizes, seed=seed).items()}


def _shorten(values: Array) -> Array:
    """To eight significant bits, as in bfloat16, and to a multiple of 2^-24, as in float16."""
    bits = values.view(np.uint32)
    # Half a unit is added, and the lower bits are dropped: ties go away from 0.
    short = ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    return short.astype(np.float16).astype(np.float32)
