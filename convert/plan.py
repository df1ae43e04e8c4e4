"""What a conversion is to do, once the source is known to be a complete model with its
configuration and vocabulary."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from convert import configs, mapping
from convert.sources import Source
from convert.vocabulary import Vocabulary, find_vocabulary
from gpt2ml_torch.config import MAX_LAYERS, GPT2MLConfig
from gpt2ml_torch.modelfile.format import expected_shapes, slot_shapes

_MAX_FAULTS = 200  # named in one error; a hostile file may have millions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chose; `vocab` and `config` are files, None to look beside the source."""

    dtype: str = "float32"
    quantization: str | None = None  # of the large matrices; `dtype` is then that of the rest
    config: Path | None = None
    vocab: Path | None = None
    with_vocab: bool = True
    keep_optimizer: bool = False
    verify: bool = True
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tensors are made of what, and what goes with them."""

    recipes: dict[str, mapping.Recipe]
    slots: dict[str, mapping.Recipe]  # those of the optimizer that are kept
    config: GPT2MLConfig
    vocabulary: Vocabulary | None
    dropped: dict[str, list[str]]
    notes: list[str]
    inputs: list[Path]


def make_plan(source: Source, folder: Path, options: Options) -> Plan:
    """Raises `ValueError` for a source that is no complete model, naming all faults; `OSError`."""
    inventory = mapping.take_inventory(source.entries, source.format)
    recipes = mapping.recipes(min(inventory.layers, MAX_LAYERS), source.format)
    sizes = _sizes(source, recipes, inventory)
    origin = options.config or configs.find_config(folder)
    given = configs.read_config(origin) if origin else {}
    config, notes = configs.merge(sizes, given, origin=origin)
    shapes = expected_shapes(config)
    faults = mapping.find_faults(source.entries, recipes, shapes, inventory.unknown)
    if faults:
        raise ValueError(f"{source.name} is no complete GPT2_ML: {_enumerate(faults)}")
    source.check()
    slots = _plan_slots(source, recipes, config) if options.keep_optimizer else {}
    kept = {name for recipe in slots.values() for name in recipe.sources}
    vocabulary = None
    if options.with_vocab:
        vocabulary = find_vocabulary(folder, options.vocab, config.vocab_size)
    return Plan(
        recipes={key: recipes[key] for key in shapes},
        slots=slots,
        config=config,
        vocabulary=vocabulary,
        dropped={
            reason: dropped
            for reason, names in inventory.dropped.items()
            if (dropped := [name for name in names if name not in kept])
        },
        notes=notes,
        inputs=[path for path in (origin, vocabulary and vocabulary.path) if path],
    )


def _plan_slots(
    source: Source, recipes: dict[str, mapping.Recipe], config: GPT2MLConfig
) -> dict[str, mapping.Recipe]:
    """The optimizer's statistics, all of them.

    Raises `ValueError` where any is missing, for half of them would continue no training.
    """
    shapes = slot_shapes(config)
    slots = mapping.slot_recipes(recipes, shapes)
    if not any(name in source.entries for recipe in slots.values() for name in recipe.sources):
        raise ValueError(f"{source.name} holds no optimizer; go without --keep-optimizer")
    flat = {name: (math.prod(shape),) for name, shape in shapes.items()}
    faults = mapping.find_faults(source.entries, slots, flat, ())
    if faults:
        raise ValueError(
            f"the optimizer in {source.name} is not complete: {_enumerate(faults)}; go without "
            "--keep-optimizer"
        )
    return slots


def _sizes(
    source: Source, recipes: dict[str, mapping.Recipe], inventory: mapping.Inventory
) -> dict[str, int]:
    """The model's dimensions by its tensors' shapes."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        name = recipes[key].sources[0]
        found = source.entries[name][1] if name in source.entries else None
        if found is None or len(found) != dimensions:
            what = "is missing" if found is None else f"has shape {found}"
            others = [f"unknown tensor {other!r}" for other in inventory.unknown]
            raise ValueError(
                f"{source.name} is no GPT2_ML: {_enumerate([f'{name!r} {what}', *others])}"
            )
        return found

    rows, width = shape("token_embedding.weight", 2)
    positions, _ = shape("position_embedding.weight", 2)
    if not inventory.layers:
        raise ValueError(f"{source.name} is no GPT2_ML: it has no layers")
    biases = [recipe.sources[0] for key, recipe in recipes.items() if key.endswith("mlp.up.bias")]
    name = next((name for name in biases if name in source.entries), biases[0])
    mlp = source.entries[name][1] if name in source.entries else ()
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": inventory.layers,
        "intermediate_size": mlp[0] if mlp else 4 * width,
        "max_position_embeddings": positions,
    }


def _enumerate(faults: list[str]) -> str:
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return "; ".join(faults[:_MAX_FAULTS]) + more
