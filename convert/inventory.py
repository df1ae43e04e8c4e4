"""A checkpoint's tensors sorted by what they are: weights of a known layout, what is dropped on
purpose, and what nothing explains."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from convert import mapping
from convert.mapping import Layout
from convert.source import Source, Stored

SLOTS, AVERAGES, TIED = "optimiser slots", "moving averages", "tied output layer"
_STEP, _SCALARS, _UNNAMED = "step counter", "scalars", "unnamed variables"
# Parts of a name that programs put around modules, wherever they stand.
_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
_OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"  # ends the names of tf.train.Checkpoint
# What the names of an optimizer's state, or of averages, are made of.
_STATE_PARTS = (
    "optimi", "adam", "adafactor", "adagrad", "adadelta", "momentum", "rmsprop", "accum",
    "gradient", "movingav", "shadow",
)  # fmt: skip
_STATE_WORDS = frozenset(("ema", "lamb", "lars", "sgd", "slot", "slots", "grad", "grads", "avg",
                          "average", "averages", "moving"))  # fmt: skip
_STATE_ENDS = r"(?:m|v|vr|vc|adam\w*|adafactor\w*|accum\w*|momentum\w*|grad\w*|lamb\w*|slot\w*)"
_AVERAGE_ENDS = r"(?:exponentialmovingaverage|moving_?av|ema|avg|average|averaged|swa|shadow)\w*"
_AVERAGED = re.compile(rf"(?i)(?:.*[/_])?{_AVERAGE_ENDS}")


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A source's tensors under the names of the layout that was recognised.

    `original` gives their names in the source; `layers` is the highest layer's number plus one;
    `dropped` holds names by the reason for it, `unknown` what nothing explains.
    """

    layout: Layout
    tensors: dict[str, Stored]
    original: dict[str, str]
    layers: int
    dropped: dict[str, list[str]]
    unknown: list[str]
    scope: str  # under which the names stand in the source


def take_inventory(source: Source) -> Inventory:
    """Recognise the layout and sort the tensors by what they are.

    Raises `ValueError` where the weights are there twice, under different scopes.
    """
    layout, scope, aside = _recognise(source)
    rules = _Rules(layout, scope, aside)
    tensors: dict[str, Stored] = {}
    original: dict[str, str] = {}
    layers, dropped, unknown = 0, dict[str, list[str]](), []
    for raw, stored in source.tensors.items():
        bare = _bare(raw, layout)
        name = bare if rules.stands_aside(bare) else _without_scope(bare, scope, layout)
        if name in original:
            raise ValueError(f"{source.name} has {name!r} twice: {original[name]!r} and {raw!r}")
        tensors[name], original[name] = stored, raw
        if match := rules.weight.fullmatch(name):
            layers = max(layers, int(match[1] or -1) + 1)
        elif reason := rules.drop_reason(name, bare, stored):
            dropped.setdefault(reason, []).append(name)
        else:
            unknown.append(name if raw.endswith(name) else raw)
    return Inventory(layout, tensors, original, layers, dropped, sorted(unknown), scope)


def _recognise(source: Source) -> tuple[Layout, str, list[str]]:
    """The layout of a source, the scope that its names stand under, and the scopes under which
    copies stand that belong to an optimizer."""
    for layout in source.layouts:
        names = [_bare(name, layout) for name in source.tensors]
        if layout.mark and not any(layout.mark in name for name in names):
            continue
        end = layout.separator + layout.anchor
        scopes = {
            name.removesuffix(layout.anchor)
            for name in names
            if name == layout.anchor or name.endswith(end)
        }
        aside = [scope for scope in scopes if layout.has_slots and _names_state(scope)]
        found = scopes.difference(aside) or scopes
        if len(found) > 1:
            shown = " and ".join(repr(scope + layout.anchor) for scope in sorted(found)[:2])
            raise ValueError(
                f"{source.name} has {layout.anchor!r} twice: {shown}; keep one set of weights"
            )
        if found:
            scope = found.pop()
            return layout, scope, [other for other in aside if other != scope]
    return source.layouts[0], source.layouts[0].scope, []


def _names_state(scope: str) -> bool:
    """Whether a scope's name says that an optimizer's state or averages stand under it."""
    words = re.split(r"[^a-z]+", scope.lower())
    return not _STATE_WORDS.isdisjoint(words) or any(
        part in word for part in _STATE_PARTS for word in words
    )


def _bare(name: str, layout: Layout) -> str:
    """A name without what programs put into or behind it."""
    if layout.separator == "/":
        if name.endswith(_OBJECT):
            name = name.removesuffix(_OBJECT).replace(".S", "/")
        return name.removesuffix(":0")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_scope(name: str, scope: str, layout: Layout) -> str:
    """The layout's own name of a tensor under `scope`; of others, without the part of the scope
    that they share: an output layer may stand beside `transformer.`, both inside `module.`."""
    if name.startswith(scope):
        return layout.scope + name.removeprefix(scope)
    parts = scope.split(layout.separator)[:-1]
    for count in range(len(parts), 0, -1):
        shared = layout.separator.join(parts[:count]) + layout.separator
        if name.startswith(shared):
            return name.removeprefix(shared)
    return name


class _Rules:
    """What a name is, by the layout and the scopes of its source."""

    def __init__(self, layout: Layout, scope: str, aside: Sequence[str]) -> None:
        self._layout = layout
        self.weight = re.compile(mapping.weight_pattern(layout, [layout.scope]))
        known = mapping.weight_pattern(layout, [scope, layout.scope])
        self._below = re.compile(
            f"(?:.*/)?(?:{known})(?:/(.+)|_((?i:{_STATE_ENDS}|{_AVERAGE_ENDS})(?:/.*)?))", re.DOTALL
        )
        self._aside = tuple(aside)
        self._copy = re.compile(f"({mapping.weight_pattern(layout, aside)})(?:[/_].+)?", re.DOTALL)

    def stands_aside(self, bare: str) -> bool:
        """Whether it stands where an optimizer keeps copies of the weights."""
        return bare.startswith(self._aside) and self._copy.fullmatch(bare) is not None

    def drop_reason(self, name: str, bare: str, stored: Stored) -> str | None:
        """Why a tensor that is no weight is left out, None if nothing explains it.

        Other optimizers leave their own state in TensorFlow's checkpoints: variables that hang
        below a weight's name, copies of the weights under a scope of their own, lone scalars such
        as beta1_power or loss_scale, and variables without a name.
        """
        layout = self._layout
        if name == layout.tied:
            return TIED
        for reason, pattern in layout.ignored.items():
            if re.fullmatch(pattern, name):
                return reason
        if not layout.has_slots:
            return None
        if self.stands_aside(bare):
            scope = next(scope for scope in self._aside if bare.startswith(scope))
            return AVERAGES if _AVERAGED.match(scope) else SLOTS
        if match := self._below.fullmatch(bare):
            last = (match[2] or match[3]).rpartition("/")[2]
            return AVERAGES if _AVERAGED.fullmatch(last) else SLOTS
        if math.prod(stored.shape) == 1:
            return _STEP if name.endswith(mapping.TF_STEP) else _SCALARS
        return _UNNAMED if re.fullmatch(r"(?:.*/)?Variable(?:_\d+)?", bare) else None
