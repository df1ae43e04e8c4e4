"""Plan a conversion from a source's names and shapes, or report every fault that prevents it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import configs, mapping
from convert.inventory import AVERAGES, SLOTS, Inventory, take_inventory
from convert.mapping import Recipe
from convert.source import Source, Stored
from convert.vocabulary import Vocabulary, find_vocabulary
from gpt2ml_torch.config import MAX_LAYERS, GPT2MLConfig
from gpt2ml_torch.export import names as exported
from gpt2ml_torch.modelfile.format import expected_shapes, slot_shapes
from gpt2ml_torch.options import OptionError, check_options, option
from gpt2ml_torch.precision import FLOATING, INTEGER

_MAX_FAULTS = 200  # named in one error; a hostile file may have millions
_PRECISIONS = ("float32", "bfloat16", "float16", *(precision.value for precision in INTEGER))
_TIED_ROWS = 4096  # compared at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert. Raises `ValueError`, naming the field, for values that make no sense."""

    config: Path | None = option(
        None,
        path=True,
        metavar="FILE",
        help="config.json, with the original's or the community's names",
        default_text="beside the source",
    )
    vocab: Path | None = option(
        None, path=True, metavar="FILE", help="vocab.txt", default_text="beside the source"
    )
    with_vocab: bool = option(True, flags="--no-vocab", inverted=True, help="store no vocabulary")
    dtype: str = option("float32", choices=_PRECISIONS, help="precision of the weights")
    keep_optimizer: bool = option(
        False,
        flags="--keep-optimizer",
        help="keep Adafactor's statistics, from which fine-tuning continues; 0.1 % more",
    )
    allow_non_finite: bool = option(
        False,
        flags="--allow-non-finite",
        help="convert even if a tensor holds NaN or infinity",
    )
    overwrite: bool = option(False, flags="--force", help="replace existing files")
    verify: bool = option(
        True,
        flags="--no-verify",
        inverted=True,
        help="accept a published size with another SHA-256",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.vocab is not None and not self.with_vocab:
            raise OptionError("{with_vocab=False} excludes {vocab}; leave one of them out")
        if self.keep_optimizer and self.packed is not None:
            raise OptionError(
                "{keep_optimizer=True} excludes {dtype=" + self.dtype + "}, which can't be tuned; "
                "leave one of them out"
            )

    @property
    def packed(self) -> str | None:
        """The integer precision of the large matrices, or None if they are not packed."""
        return self.dtype if self.dtype in INTEGER else None

    @property
    def unpacked_dtype(self) -> str:
        """The dtype of every tensor that isn't packed."""
        return "float32" if self.packed else self.dtype


class OptimizerError(OptionError):
    """The optimizer's statistics were to be kept, but the source lacks some or all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How to make each tensor of the model file."""

    recipes: dict[str, Recipe]
    slots: dict[str, Recipe]  # recipes of the optimizer's statistics that are kept
    config: GPT2MLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(TensorPlan):
    """How to make each tensor of the model file, and the metadata that goes with them."""

    source: dict[str, Any]  # the origin of the weights, as far as an exported folder knows it
    generation: dict[str, Any]  # generation defaults in an exported folder
    vocabulary: Vocabulary | None
    dropped: dict[str, int]  # number of tensors that are left out, by the reason
    notes: list[str]  # for the user
    inputs: list[Path]  # files read beside the weights


def make_plan(source: Source, folder: Path, options: Options) -> Plan:
    """Plan a conversion.

    Raises `ValueError`, with all faults, for a source that is not a complete model, and `OSError`
    for a file that can't be read.
    """
    inventory = take_inventory(source)
    origin = options.config or configs.find_config(folder)
    _check_architecture(source, inventory, origin)
    sizes = _sizes(source, inventory)
    given = configs.read_config(origin) if origin else {}
    config, notes = configs.merge(sizes, given, origin=origin)
    tensors = _plan_tensors(source, inventory, config, keep_optimizer=options.keep_optimizer)
    vocabulary = None
    if options.with_vocab:
        vocabulary = find_vocabulary(folder, options.vocab, config.vocab_size)
        notes = [*notes, *vocabulary.notes]
    return Plan(
        recipes=tensors.recipes,
        slots=tensors.slots,
        config=config,
        source=configs.read_extra(origin, exported.SOURCE_KEY),
        generation=configs.read_defaults(origin),
        vocabulary=vocabulary,
        dropped=_count_dropped(inventory, tensors),
        notes=[*notes, *_notes_on(inventory)],
        inputs=[path for path in (origin, vocabulary and vocabulary.path) if path],
    )


def plan_tensors(source: Source, *, keep_optimizer: bool) -> TensorPlan:
    """Plan the tensors alone, for which no configuration is needed: the `config` has their sizes,
    but one head.

    Raises `ValueError` as `make_plan` does, and `OptimizerError`.
    """
    inventory = take_inventory(source)
    sizes = _sizes(source, inventory)
    config, _ = configs.merge(sizes, {"num_attention_heads": 1}, origin=None)
    return _plan_tensors(source, inventory, config, keep_optimizer=keep_optimizer)


def _plan_tensors(
    source: Source, inventory: Inventory, config: GPT2MLConfig, *, keep_optimizer: bool
) -> TensorPlan:
    recipes = _recipes(inventory)
    shapes = expected_shapes(config)
    faults = find_faults(inventory.tensors, recipes, shapes, inventory.unknown)
    if faults:
        raise ValueError(f"{source.name} is not a complete GPT2_ML: {_enumerate(faults)}")
    _check_tied(source, inventory)
    slots = _plan_slots(source, inventory, recipes, config) if keep_optimizer else {}
    return TensorPlan(
        recipes={key: _renamed(recipes[key], inventory) for key in shapes},
        slots={name: _renamed(recipe, inventory) for name, recipe in slots.items()},
        config=config,
    )


def _recipes(inventory: Inventory) -> dict[str, Recipe]:
    return mapping.recipes(min(inventory.layers, MAX_LAYERS), inventory.layout)


def _check_architecture(source: Source, inventory: Inventory, origin: Path | None) -> None:
    """Raise `ValueError` for a model of another architecture that shares names with a layout.

    The community's configurations call GPT2_ML "gpt2", so there the tensors decide.
    """
    layout, names = inventory.layout, inventory.tensors
    other = None
    if layout is mapping.COMMUNITY and "ln_f.weight" in names and "emb_norm.weight" not in names:
        other = "OpenAI's GPT-2 (a final norm, and none after the embedding)"
    elif layout in (mapping.TRANSFORMERS, mapping.TRANSFORMERS_JOINED):
        model_type = configs.model_type(origin)
        other = None if model_type in (None, exported.MODEL_TYPE) else repr(model_type[:40])
    if other:
        raise ValueError(
            f"{source.name} is a model of another architecture, {other}; give a GPT2_ML"
        )
    if layout in (mapping.TRANSFORMERS, mapping.TRANSFORMERS_JOINED):
        configs.check_exported(origin)


def _renamed(recipe: Recipe, inventory: Inventory) -> Recipe:
    """The recipe under the names that the source uses."""
    names = tuple(inventory.original[name] for name in recipe.sources)
    return dataclasses.replace(recipe, sources=names)


def _count_dropped(inventory: Inventory, plan: TensorPlan) -> dict[str, int]:
    kept = {name for recipe in plan.slots.values() for name in recipe.sources}
    counts = {
        reason: sum(name not in kept for name in names)
        for reason, names in inventory.dropped.items()
    }
    return {reason: count for reason, count in counts.items() if count}


def _notes_on(inventory: Inventory) -> list[str]:
    """Notes for the user on the tensors' names."""
    notes = []
    scope = inventory.scope
    if inventory.layout.has_slots and scope != inventory.layout.scope:
        notes.append(f"the weights' names begin with {scope!r}, not {inventory.layout.scope!r}")
    if averages := inventory.dropped.get(AVERAGES):
        notes.append(
            f"{len(averages)} moving averages of weights were dropped; the weights themselves were "
            "taken"
        )
    return notes


def _check_tied(source: Source, inventory: Inventory) -> None:
    """Raise `ValueError` if a stored output layer differs from the token embedding.

    GPT2_ML has one matrix for both.
    """
    layout = inventory.layout
    if layout.tied not in inventory.original:
        return
    tied, embedding = layout.tied, layout.scope + layout.anchor
    same = inventory.tensors[tied] == inventory.tensors[embedding]
    if same:
        a, b = (source.read(inventory.original[name]) for name in (tied, embedding))
        same = all(
            a[start : start + _TIED_ROWS].tobytes() == b[start : start + _TIED_ROWS].tobytes()
            for start in range(0, len(a), _TIED_ROWS)
        )
    if not same:
        raise ValueError(
            f"{source.name}: {tied} differs from {embedding}; in GPT2_ML they are one tensor"
        )


def _plan_slots(
    source: Source, inventory: Inventory, recipes: dict[str, Recipe], config: GPT2MLConfig
) -> dict[str, Recipe]:
    """The recipes of Adafactor's statistics.

    Raises `OptimizerError` if any is missing, since training can't continue from a part of them.
    """
    shapes = slot_shapes(config)
    slots = mapping.slot_recipes(recipes, shapes)
    if not any(name in inventory.tensors for r in slots.values() for name in r.sources):
        other = " of Adafactor, only another's state" if SLOTS in inventory.dropped else ""
        raise OptimizerError(
            "{} holds no optimizer state{}; leave out {keep_optimizer=True}", source.name, other
        )
    flat = {name: (math.prod(shape),) for name, shape in shapes.items()}
    faults = find_faults(inventory.tensors, slots, flat, ())
    if faults:
        raise OptimizerError(
            "the optimizer state in {} is not complete: {}; leave out {keep_optimizer=True}",
            *(source.name, _enumerate(faults)),
        )
    return slots


def _sizes(source: Source, inventory: Inventory) -> dict[str, int]:
    """The model's dimensions, from its tensors' shapes."""
    recipes = _recipes(inventory)

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        name = recipes[key].sources[0]
        found = inventory.tensors[name].shape if name in inventory.tensors else None
        if found is None or len(found) != dimensions:
            what = "is missing" if found is None else f"has shape {found}"
            others = [f"unknown tensor {other!r}" for other in inventory.unknown]
            raise ValueError(
                f"{source.name} is not a GPT2_ML: {_enumerate([f'{name!r} {what}', *others])}"
            )
        return found

    rows, width = shape("token_embedding.weight", 2)
    positions, _ = shape("position_embedding.weight", 2)
    if not inventory.layers:
        raise ValueError(f"{source.name} is not a GPT2_ML: it has no layers")
    biases = [recipe.sources[0] for key, recipe in recipes.items() if key.endswith("mlp.up.bias")]
    name = next((name for name in biases if name in inventory.tensors), biases[0])
    mlp = inventory.tensors[name].shape if name in inventory.tensors else ()
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": inventory.layers,
        "intermediate_size": mlp[0] if mlp else 4 * width,
        "max_position_embeddings": positions,
    }


def find_faults(
    tensors: Mapping[str, Stored],
    plan: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
) -> list[str]:
    """Every difference between these tensors and the plan's, one phrase each."""
    faults = [f"unknown tensor {name!r}" for name in unknown]
    missing = []
    for key, recipe in plan.items():
        expected = recipe.source_shape(shapes[key])
        for name in recipe.sources:
            if name not in tensors:
                missing.append(name)
                continue
            found = tensors[name]
            if found.dtype not in FLOATING:
                what = found.dtype or found.instead
                faults.append(f"{name!r} holds {what}, expected floating point")
            elif found.shape != expected:
                faults.append(f"{name!r} has shape {found.shape}, expected {expected}")
    return faults + _describe_missing(missing, plan)


def _describe_missing(missing: Sequence[str], plan: Mapping[str, Recipe]) -> list[str]:
    """Missing tensors: whole layers as one phrase each, the others by name."""
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


def _enumerate(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return "; ".join(faults[:_MAX_FAULTS]) + more
