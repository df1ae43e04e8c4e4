"""The table of names: where each weight of the model file is found in existing checkpoints.

A `Layout` is one family of names. To read another family, add a layout here and to the `layouts` of
the formats in which it occurs. The mapping, its inverse and the list of tensors in a complete
checkpoint are derived from it.
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
    """One family of names.

    A name consists of `scope`; inside the layers, `layer` with the layer's number; the name of the
    module; and a suffix. A module with several names in `modules` is joined from them along the
    output axis, in that order.

    `transposed` means that linear weights are (in, out), while the model file has (out, in). For a
    square matrix nothing else would show a forgotten transpose. `ignored` maps a word for each kind
    of tensor that is dropped on purpose to a pattern of its names. `tied` is a copy of the token
    embedding that some files hold.
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
    mark: str | None = None  # part of some name; needed if another layout has the same anchor
    has_slots: bool = False  # whether names of optimizer state extend the weights' names

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

# As stored by programs that join the three matrices for speed.
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
    """How to make one weight of the model file: join these tensors, each transposed if `transpose`,
    along the first axis.
    """

    sources: tuple[str, ...]
    transpose: bool

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that each source must have for a result of this shape."""
        part = (shape[0] // len(self.sources), *shape[1:])
        return part[::-1] if self.transpose else part

    def parts(self, whole: _Array) -> Iterator[tuple[str, _Array]]:
        """The sources' names, each with the view of the weight `whole` that equals the source."""
        rows = len(whole) // len(self.sources)
        for index, name in enumerate(self.sources):
            part = whole[index * rows : (index + 1) * rows]
            yield name, part.T if self.transpose else part


def recipes(layers: int, layout: Layout) -> dict[str, Recipe]:
    """The recipe of each weight of a model with `layers` layers, in the order of the file."""
    result = dict(_module_recipes(OUTSIDE, "", layout.scope, layout))
    for layer in range(layers):
        theirs = layout.scope + layout.layer.format(layer)
        result.update(_module_recipes(INSIDE, f"blocks.{layer}.", theirs, layout))
    return result


def _module_recipes(
    modules: Iterable[str], ours: str, theirs: str, layout: Layout
) -> Iterator[tuple[str, Recipe]]:
    """The recipes of these modules' weights; `ours` and `theirs` are prefixes of their names."""
    for module in modules:
        for suffix, source_suffix, transpose in _suffixes(module, layout):
            names = (f"{theirs}{name}{source_suffix}" for name in layout.modules[module])
            yield f"{ours}{module}{suffix}", Recipe(tuple(names), transpose)


def _suffixes(module: str, layout: Layout) -> list[tuple[str, str, bool]]:
    """For each weight of a module, our suffix, the layout's suffix and whether it is transposed."""
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
    """A regular expression for the names of weights under these scopes.

    Its only group is the layer's number.
    """
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
