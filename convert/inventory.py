"""Sort a checkpoint's tensors into weights, tensors dropped on purpose, and unknown ones."""

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
# Parts that programs insert anywhere into a name when they wrap a module.
_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
_OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"  # ends the names of tf.train.Checkpoint
# Parts and words in the names of an optimizer's state or of moving averages.
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
    """A source's tensors under the names of the layout that was recognised."""

    layout: Layout
    tensors: dict[str, Stored]
    original: dict[str, str]  # the layout's names to the names in the source
    layers: int  # the highest layer's number plus one
    dropped: dict[str, list[str]]  # names of tensors that are dropped, by the reason
    unknown: list[str]
    scope: str  # prefix of the weights' names in the source


def take_inventory(source: Source) -> Inventory:
    """Recognise the layout and sort the tensors.

    Raises `ValueError` if a source holds the weights twice, under different scopes.
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
    """The layout of a source, the scope of its weights, and scopes of an optimizer's copies."""
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
    """Whether a scope's name is one of an optimizer's state or of moving averages."""
    words = re.split(r"[^a-z]+", scope.lower())
    return not _STATE_WORDS.isdisjoint(words) or any(
        part in word for part in _STATE_PARTS for word in words
    )


def _bare(name: str, layout: Layout) -> str:
    """A name without the parts that programs insert or append."""
    if layout.separator == "/":
        if name.endswith(_OBJECT):
            name = name.removesuffix(_OBJECT).replace(".S", "/")
        return name.removesuffix(":0")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_scope(name: str, scope: str, layout: Layout) -> str:
    """The layout's name of a tensor, without the scope of the source.

    A tensor outside `scope` loses the part that it shares with the scope: the output layer may be
    `module.lm_head` where the weights are under `module.transformer.`.
    """
    if name.startswith(scope):
        return layout.scope + name.removeprefix(scope)
    parts = scope.split(layout.separator)[:-1]
    for count in range(len(parts), 0, -1):
        shared = layout.separator.join(parts[:count]) + layout.separator
        if name.startswith(shared):
            return name.removeprefix(shared)
    return name


class _Rules:
    """Classifies names by the layout and the scopes of their source."""

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
        """Whether a name is in a scope where an optimizer keeps copies of the weights."""
        return bare.startswith(self._aside) and self._copy.fullmatch(bare) is not None

    def drop_reason(self, name: str, bare: str, stored: Stored) -> str | None:
        """The reason for dropping a tensor that is not a weight; None if it is unknown.

        Other optimizers leave their own state in TensorFlow checkpoints: variables whose names
        extend a weight's name, copies of the weights under a scope of their own, single scalars
        such as beta1_power or loss_scale, and variables without a name.
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
