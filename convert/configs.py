"""Read and write config.json in its two dialects.

The original repository uses `hidden_size`, `num_hidden_layers`, ..., and the community's PyTorch
conversion `n_embd`, `n_layer`, .... The sizes in either may be wrong: the tensors' shapes decide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.inputs import visible
from gpt2ml_torch import foreign
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.export.names import DEFAULTS_KEY
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.valid_json import ContradictionError, unique

PUBLISHED_HEAD_SIZE = 64
_MAX_BYTES = 1 << 20

# Our fields and their names in the files; `to_tf` writes the first.
DIALECTS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "vocab_size_or_config_json_file"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx"),
    "hidden_dropout_prob": ("hidden_dropout_prob", "resid_pdrop"),
    "initializer_range": ("initializer_range",),
}
_FRACTION = ((int, float), "a number")
_KINDS = {"hidden_dropout_prob": _FRACTION, "initializer_range": _FRACTION}
_MARKS = ("hidden_size", "n_embd")
_USUAL_NAMES = ("config.json", "bert_config.json", "gpt2_config.json", "model_config.json")


def find_config(folder: Path) -> Path | None:
    """The configuration in a folder, by a usual name or as the only JSON file that looks like one.

    Raises `ValueError` if several do.
    """
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [path for path in visible(folder, "*.json") if _looks_like_config(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise OptionError(
            "several configurations in {}: {}; choose one with {config}", folder, names
        )
    return found[0] if found else None


def _looks_like_config(path: Path) -> bool:
    try:
        return any(mark in _load(path) for mark in _MARKS)
    except (ValueError, OSError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The fields that a configuration file gives, under our names.

    Raises `ValueError` for a file in neither dialect or one that contradicts itself, and `OSError`
    if it can't be read.
    """
    values = _load(path)
    if not any(mark in values for mark in _MARKS):
        raise ValueError(
            f"{path} is not a configuration of this model: it has neither {' nor '.join(_MARKS)}"
        )
    result: dict[str, Any] = {}
    for field, names in DIALECTS.items():
        given = {name: values[name] for name in names if values.get(name) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            raise ValueError(f"{path} contradicts itself: {_pairs(given)}")
        for name, value in given.items():
            kinds, what = _KINDS.get(field, ((int,), "a whole number"))
            if type(value) not in kinds:
                raise ValueError(f"{path}: {name} is {value!r}; expected {what}")
            result[field] = value
    return result


def check_exported(path: Path | None) -> None:
    """Raise `ValueError` if an exported folder's configuration changes the model's formula."""
    epsilon = None if path is None else _load(path).get("layer_norm_eps")
    if epsilon is not None and epsilon != GPT2MLConfig.layer_norm_eps:
        raise ValueError(
            f"{path}: layer_norm_eps is {str(epsilon)[:40]}; GPT2_ML's is "
            f"{GPT2MLConfig.layer_norm_eps}, and with another value the weights compute another "
            "function"
        )


def model_type(path: Path | None) -> str | None:
    """The architecture that a configuration names, or None."""
    value = None if path is None else _load(path).get("model_type")
    return value if isinstance(value, str) else None


def read_extra(path: Path | None, key: str) -> dict[str, Any]:
    """The JSON object that `gpt2ml export` stored under `key` in a folder's configuration, or {}.

    Raises `ValueError` if the value is not an object.
    """
    value = {} if path is None else _load(path).get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {str(value)[:80]!r}; expected a JSON object")
    return value


def read_defaults(path: Path | None) -> dict[str, Any]:
    """Our generation defaults in an exported folder; raises `ValueError` for invalid ones."""
    values = read_extra(path, DEFAULTS_KEY)
    if values:
        try:
            from gpt2ml_torch.generation.config import GenerationConfig
        except ImportError:  # PyTorch is not installed, so they can't be checked
            return values
        try:
            GenerationConfig.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {DEFAULTS_KEY}: {error}") from None
    return values


def _load(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # reading a pipe might wait forever
        raise OptionError("{} is not a regular file; give another as {config}", path)
    if path.stat().st_size > _MAX_BYTES:
        raise OptionError("{} is too large for a configuration; give another as {config}", path)
    foreign.check(path, wanted="configuration", text=True)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=unique)
    except ContradictionError as error:
        raise ValueError(f"{path} contradicts itself: {error}; correct it") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(
            "{} is not JSON ({}); correct it or give another as {config}", path, error
        ) from None
    if not isinstance(values, dict):
        raise OptionError("{} is not a JSON object; give another as {config}", path)
    return values


def merge(
    shapes: Mapping[str, int], given: Mapping[str, Any], *, origin: Path | None
) -> tuple[GPT2MLConfig, list[str]]:
    """The configuration, with the tensors' sizes and other values from the file; and notes on it.

    Raises `ValueError` if the file contradicts the tensors in anything except the size of the
    vocabulary.
    """
    notes = []
    wrong = []
    for field, size in shapes.items():
        said = given.get(field, size)
        if said == size:
            continue
        if field == "vocab_size":
            notes.append(
                f"{origin} says vocab_size {said}, but the tensor has {size} rows; took {size}"
            )
        else:
            wrong.append(f"{field} {said} against {size} in the tensors")
    if wrong:
        raise OptionError(
            "{} contradicts the checkpoint: {}; give the right file as {config}",
            *(origin, ", ".join(wrong)),
        )
    values = {**given, **shapes}
    if "num_attention_heads" not in values:
        width = shapes["hidden_size"]
        if width % PUBLISHED_HEAD_SIZE:
            raise OptionError(
                "no configuration found, and width {} is not a multiple of the published head size "
                "{}, so the number of heads is unknown; give {config}",
                *(width, PUBLISHED_HEAD_SIZE),
            )
        values["num_attention_heads"] = width // PUBLISHED_HEAD_SIZE
        notes.append(
            f"no configuration gives the number of heads; took width {width} / "
            f"{PUBLISHED_HEAD_SIZE} = {values['num_attention_heads']}, as in all published sizes"
        )
    try:
        return GPT2MLConfig(**values), notes
    except ValueError as error:
        raise ValueError(f"{origin or 'the checkpoint'}: {error}") from None


def original_dialect(config: GPT2MLConfig) -> dict[str, Any]:
    """The configuration as the original code reads it."""
    values: dict[str, Any] = {DIALECTS[field][0]: v for field, v in config.to_dict().items()}
    return {**values, "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu"}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())
