"""The one table of names: where each weight of the file stands in the two source formats.

Everything else is derived from it: the way there, the way back, and what a complete source must
hold.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from gpt2ml_torch.precision import FLOATING

Format = Literal["tf", "bin"]
TF_SCOPE = "newslm/"

_Array = TypeVar("_Array", bound=Any)  # NumPy's or PyTorch's, which are cut and turned alike


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row: the key in the file; the source's names, `{}` standing for the layer.

    Several TF names are joined along the output axis, in that order. Sources keep linear weights as
    (in, out), so they are transposed; nothing tells a square one that was forgotten, apart from
    this table.
    """

    key: str
    tf: tuple[str, ...]
    bin: str
    transpose: bool = False

    def names(self, source: Format) -> tuple[str, ...]:
        return self.tf if source == "tf" else (self.bin,)


def _linear(key: str, tf: tuple[str, ...], bin_: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{key}.weight", tuple(f"{name}/kernel" for name in tf), f"{bin_}.weight", True),
        Weight(f"{key}.bias", tuple(f"{name}/bias" for name in tf), f"{bin_}.bias"),
    )


def _norm(key: str, tf: str, bin_: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{key}.weight", (f"{tf}/gamma",), f"{bin_}.weight"),
        Weight(f"{key}.bias", (f"{tf}/beta",), f"{bin_}.bias"),
    )


_LAYER = TF_SCOPE + "layer{:02d}/"
_QKV = tuple(f"{_LAYER}{part}_layer" for part in ("query", "key", "value"))

TABLE: tuple[Weight, ...] = (
    Weight("token_embedding.weight", (TF_SCOPE + "embeddings/word_embed",), "wte.weight"),
    Weight("position_embedding.weight", (TF_SCOPE + "embeddings/pos_embed",), "wpe.weight"),
    *_norm("embedding_norm", TF_SCOPE + "embeddings/LayerNorm_embed_norm", "emb_norm"),
    *_linear("blocks.{}.attention.qkv", _QKV, "h.{}.attn.c_attn"),
    *_linear(
        "blocks.{}.attention.output", (_LAYER + "context_projection_layer",), "h.{}.attn.c_proj"
    ),
    # The community's ln_1 and ln_2 are not OpenAI's: they stand before and after the MLP.
    *_norm("blocks.{}.mlp_norm", _LAYER + "LayerNorm_mlp_ln0", "h.{}.ln_1"),
    *_linear("blocks.{}.mlp.up", (_LAYER + "intermediate",), "h.{}.mlp.c_fc"),
    *_linear("blocks.{}.mlp.down", (_LAYER + "output",), "h.{}.mlp.c_proj"),
    *_norm("blocks.{}.output_norm", _LAYER + "LayerNorm_mlp_ln1", "h.{}.ln_2"),
)

# Dropped on purpose: optimiser slots of known weights and the step counter; causal masks kept as
# buffers; the tied output.
TF_SLOT = re.compile(r"(?P<weight>.+)/(?:adafactor_(?:v|vr|vc|m)|adam_(?:m|v))")
TF_STEP = "global_step"
_BIN_BUFFER = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")
BIN_TIED = "lm_head.weight"
BIN_PREFIX = "transformer."


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight of the file is made: these tensors, each transposed or not, joined along the
    first axis."""

    sources: tuple[str, ...]
    transpose: bool

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that each source must have for a result of this shape."""
        part = (shape[0] // len(self.sources), *shape[1:])
        return part[::-1] if self.transpose else part

    def parts(self, whole: _Array) -> Iterator[tuple[str, _Array]]:
        """The sources' names, each with the view of the result that holds that source."""
        rows = len(whole) // len(self.sources)
        for index, name in enumerate(self.sources):
            part = whole[index * rows : (index + 1) * rows]
            yield name, part.T if self.transpose else part


def recipes(layers: int, source: Format) -> dict[str, Recipe]:
    """The recipe of each weight of a model with so many layers, in the order of the file."""
    result = {}
    for weight in TABLE:
        if "{" not in weight.key:
            result[weight.key] = Recipe(weight.names(source), weight.transpose)
    for layer in range(layers):
        for weight in TABLE:
            if "{" in weight.key:
                names = tuple(name.format(layer) for name in weight.names(source))
                result[weight.key.format(layer)] = Recipe(names, weight.transpose)
    return result


def slot_recipes(weights: Mapping[str, Recipe], slots: Iterable[str]) -> dict[str, Recipe]:
    """The recipes of the optimizer's statistics, named `<weight>.<slot>`, as flat vectors."""
    result = {}
    for name in slots:
        key, _, slot = name.rpartition(".")
        if weights[key].transpose:  # a kernel's rows are the weight's columns
            slot = {"vr": "vc", "vc": "vr"}[slot]
        sources = (f"{source}/adafactor_{slot}" for source in weights[key].sources)
        result[name] = Recipe(tuple(sources), transpose=False)
    return result


@dataclasses.dataclass(frozen=True)
class Inventory:
    """The names of a source, sorted: the highest layer plus one, what is dropped, and what nobody
    knows."""

    layers: int
    dropped: dict[str, list[str]]
    unknown: list[str]


def take_inventory(names: Iterable[str], source: Format) -> Inventory:
    """Sort the source's names (without a `transformer.` prefix) by what they are."""
    layers = 0
    dropped: dict[str, list[str]] = {}
    unknown = []
    for name in names:
        layer = _weight_layer(name, source)
        if layer is not None:
            layers = max(layers, layer + 1)
        elif reason := _drop_reason(name, source):
            dropped.setdefault(reason, []).append(name)
        else:
            unknown.append(name)
    return Inventory(layers, dropped, sorted(unknown))


def _weight_layer(name: str, source: Format) -> int | None:
    """The layer of a weight, -1 for one outside the layers, None for what is no weight."""
    for weight in TABLE:
        for template in weight.names(source):
            head, brace, tail = template.partition("{")
            if not brace:
                if name == template:
                    return -1
                continue
            tail = tail.partition("}")[2]
            digits = name[len(head) : len(name) - len(tail)]
            plausible = digits.isascii() and digits.isdigit() and len(digits) < 7
            if plausible and template.format(int(digits)) == name:
                return int(digits)
    return None


def _drop_reason(name: str, source: Format) -> str | None:
    if source == "tf":
        if name == TF_STEP:
            return "step counter"
        slot = TF_SLOT.fullmatch(name)
        known = slot is not None and _weight_layer(slot["weight"], source) is not None
        return "optimiser slots" if known else None
    if _BIN_BUFFER.fullmatch(name):
        return "mask buffers"
    return "tied output layer" if name == BIN_TIED else None


def find_faults(
    entries: Mapping[str, tuple[str | None, tuple[int, ...]]],
    plan: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
) -> list[str]:
    """Every reason why a source is not a complete model of these shapes, one phrase each."""
    faults = [f"unknown tensor {name!r}" for name in unknown]
    missing = []
    for key, recipe in plan.items():
        expected = recipe.source_shape(shapes[key])
        for name in recipe.sources:
            if name not in entries:
                missing.append(name)
                continue
            dtype, shape = entries[name]
            if dtype not in FLOATING:
                faults.append(f"{name!r} holds {dtype or 'no numbers'}, expected floating point")
            if shape != expected:
                faults.append(f"{name!r} has shape {shape}, expected {expected}")
    return faults + _describe_missing(missing, plan)


def _describe_missing(missing: list[str], plan: Mapping[str, Recipe]) -> list[str]:
    """Whole layers as one phrase, the rest by name."""
    by_layer: dict[str, list[str]] = {}
    for key, recipe in plan.items():
        if key.startswith("blocks."):
            by_layer.setdefault(key.split(".")[1], []).extend(recipe.sources)
    gone = set(missing)
    faults = []
    for layer, names in by_layer.items():
        if gone.issuperset(names):
            faults.append(f"layer {layer} is missing altogether ({len(names)} tensors)")
            gone.difference_update(names)
    return faults + [f"missing tensor {name!r}" for name in missing if name in gone]
