"""The table of names: where each weight of the file stands in the checkpoints that people have.

A `Layout` is one family of names. To read another family, add a layout here and to the `layouts` of
the formats that it comes in. The way there, the way back and the list of what a complete checkpoint
holds are derived from it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from gpt2ml_torch.export import names as exported

_Array = TypeVar("_Array", bound=Any)  # NumPy's or PyTorch's: both are cut and transposed alike

# Modules of the file: outside the layers, then inside each of them.
OUTSIDE = ("token_embedding", "position_embedding", "embedding_norm")
INSIDE = ("attention.qkv", "attention.output", "mlp_norm", "mlp.up", "mlp.down", "output_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One family of names: `scope`, then `layer` with its number inside the layers, then the name
    of the module, then a suffix.

    A module that `modules` gives several names is joined from them along the output axis, in that
    order. `transposed` says that linear weights are (in, out), where the file has (out, in);
    nothing else tells a square one whose transpose was forgotten. `ignored` are names dropped on
    purpose, by the word for them; `tied` is a copy of the token embedding that some files hold.
    """

    name: str
    scope: str = ""
    layer: str
    modules: Mapping[str, tuple[str, ...]]
    linear: tuple[str, str] = (".weight", ".bias")
    norm: tuple[str, str] = (".weight", ".bias")
    embedding: str = ".weight"
    separator: str = "."
    transposed: bool
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)  # regular expressions
    tied: str | None = None
    mark: str | None = None  # a part of some name, where the anchor is another layout's too
    has_slots: bool = False  # optimizer state hangs below the weights' names

    @property
    def anchor(self) -> str:
        """The name, without scope, by which the layout is recognised."""
        return self.modules["token_embedding"][0] + self.embedding


TENSORFLOW = Layout(
    name="the original TensorFlow code",
    scope="newslm/",
    layer="layer{:02d}/",
    modules={
        "token_embedding": ("embeddings/word_embed",),
        "position_embedding": ("embeddings/pos_embed",),
        "embedding_norm": ("embeddings/LayerNorm_embed_norm",),
        "attention.qkv": ("query_layer", "key_layer", "value_layer"),
        "attention.output": ("context_projection_layer",),
        "mlp_norm": ("LayerNorm_mlp_ln0",),
        "mlp.up": ("intermediate",),
        "mlp.down": ("output",),
        "output_norm": ("LayerNorm_mlp_ln1",),
    },
    linear=("/kernel", "/bias"),
    norm=("/gamma", "/beta"),
    embedding="",
    separator="/",
    transposed=True,
    has_slots=True,
)

COMMUNITY = Layout(
    name="the community's PyTorch code",
    layer="h.{}.",
    modules={
        "token_embedding": ("wte",),
        "position_embedding": ("wpe",),
        "embedding_norm": ("emb_norm",),
        "attention.qkv": ("attn.c_attn",),
        "attention.output": ("attn.c_proj",),
        # ln_1 and ln_2 are not OpenAI's: they stand before and after the MLP.
        "mlp_norm": ("ln_1",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
        "output_norm": ("ln_2",),
    },
    transposed=True,
    ignored={"mask buffers": r"h\.\d+\.attn\.(?:bias|masked_bias)"},
    tied="lm_head.weight",
)

TRANSFORMERS = Layout(
    name="the exported class for transformers",
    scope=exported.SCOPE,
    layer=exported.LAYER,
    modules=exported.MODULES,
    transposed=False,
    tied=exported.HEAD,
)

# As programs store it that join matrices for speed.
TRANSFORMERS_JOINED = dataclasses.replace(
    TRANSFORMERS,
    modules={**exported.MODULES, "attention.qkv": ("self_attn.qkv_proj",)},
    mark=".self_attn.qkv_proj.",
)

OURS = Layout(
    name="gpt2ml_torch",
    layer="blocks.{}.",
    modules={module: (module,) for module in (*OUTSIDE, *INSIDE)},
    transposed=False,
)

PYTORCH = (COMMUNITY, TRANSFORMERS_JOINED, TRANSFORMERS, OURS)

TF_STEP = "global_step"


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


def recipes(layers: int, layout: Layout) -> dict[str, Recipe]:
    """The recipe of each weight of a model with so many layers, in the order of the file."""
    result = dict(_module_recipes(OUTSIDE, "", layout.scope, layout))
    for layer in range(layers):
        theirs = layout.scope + layout.layer.format(layer)
        result.update(_module_recipes(INSIDE, f"blocks.{layer}.", theirs, layout))
    return result


def _module_recipes(
    modules: Iterable[str], ours: str, theirs: str, layout: Layout
) -> Iterator[tuple[str, Recipe]]:
    """The recipes of these modules' weights, `ours` and `theirs` standing before their names."""
    for module in modules:
        for suffix, source_suffix, transpose in _suffixes(module, layout):
            names = (f"{theirs}{name}{source_suffix}" for name in layout.modules[module])
            yield f"{ours}{module}{suffix}", Recipe(tuple(names), transpose)


def _suffixes(module: str, layout: Layout) -> list[tuple[str, str, bool]]:
    """Of each weight of a module: our suffix, the layout's, and whether it is transposed."""
    if module.endswith("embedding"):
        return [(".weight", layout.embedding, False)]
    if module.endswith("norm"):
        return [(".weight", layout.norm[0], False), (".bias", layout.norm[1], False)]
    weight, bias = layout.linear
    return [(".weight", weight, layout.transposed), (".bias", bias, False)]


def slot_recipes(weights: Mapping[str, Recipe], slots: Iterable[str]) -> dict[str, Recipe]:
    """The recipes of Adafactor's statistics, named `<weight>.<slot>`, as flat vectors."""
    result = {}
    for name in slots:
        key, _, slot = name.rpartition(".")
        if weights[key].transpose:  # a kernel's rows are the weight's columns
            slot = {"vr": "vc", "vc": "vr"}[slot]
        sources = (f"{source}/adafactor_{slot}" for source in weights[key].sources)
        result[name] = Recipe(tuple(sources), transpose=False)
    return result


def weight_pattern(layout: Layout, scopes: Iterable[str]) -> str:
    """A regular expression for the names of weights under these scopes; its one group is the
    layer's number."""
    digits = {"{}": "0|[1-9][0-9]{0,5}", "{:02d}": "[0-9]{2}|[1-9][0-9]{2,5}"}
    head, brace, tail = re.split(r"(\{.*?\})", layout.layer)
    number = f"{re.escape(head)}({digits[brace]}){re.escape(tail)}"
    outside, inside = (
        "|".join(
            re.escape(name)
            for _, recipe in _module_recipes(modules, "", "", layout)
            for name in recipe.sources
        )
        for modules in (OUTSIDE, INSIDE)
    )
    scope = "|".join(map(re.escape, scopes))
    return f"(?:{scope})(?:(?:{outside})|{number}(?:{inside}))"
