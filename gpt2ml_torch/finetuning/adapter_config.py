"""Parse and check peft's `adapter_config.json`, and tell which modules have an adapter.

peft itself is not needed. A setting that changes the result and is not supported here is an error,
so an adapter is never merged in part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from gpt2ml_torch.valid_json import ContradictionError, unique

MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 1 << 16
_MAX_PATTERN = 1000  # characters
_MAX_REPEATS = 5  # `*`, `+` and `{...}` in a pattern: matching takes time exponential in them

# Settings that don't change the result: they concern training, or belong to settings checked here.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",  # peft ignores it for linear layers
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ]
)
# Parts that other libraries put before or into the name of a module.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PEFT_PREFIX = "base_model.model."

# Other values of `init_lora_weights` change the base weights before training.
_PLAIN_INITIALIZERS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings of a LoRA adapter that decide what it adds to which weights."""

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...]  # a regular expression, or names and ends of names
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    rank_stabilized: bool = False
    magnitude: bool = False  # DoRA
    lora_bias: bool = False

    @classmethod
    def from_json(cls, text: str | bytes) -> AdapterConfig:
        """Parse and check; raises `ValueError` for damaged or unsupported settings."""
        try:
            values = json.loads(text, object_pairs_hook=unique)
        except ContradictionError as error:
            raise ValueError(f"it contradicts itself: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"it is a JSON {type(values).__name__}; expected an object")
        values = dict(values)
        kind = values.pop("peft_type", None)
        if kind != "LORA":
            raise ValueError(f"peft_type is {_short(kind)}; only LORA can be merged here")
        return cls(**_known(values), **_lists(values), **_patterns(values), **_rest(values))

    def targets(self, module: str) -> bool:
        """Whether a module of the model has an adapter, by peft's rules."""
        if _named(self.exclude_modules, module) or self.saves(module):
            return False
        if not _named(self.target_modules, module):
            return False
        exact = isinstance(self.target_modules, str) or module in self.target_modules
        return exact or not self.layers or self._layer_of(module) in self.layers

    def saves(self, module: str) -> bool:
        """Whether the adapter holds whole weights that replace the module's own."""
        parts = f".{module}."
        return any(f".{name}." in parts for name in self.modules_to_save)

    def rank_of(self, module: str) -> int:
        """The rank of the module's adapter."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of the product of the module's two matrices."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){re.escape(name)}" for name in self.layers_pattern]
        for pattern in patterns or [r".*?[^.]*"]:
            if match := re.match(rf"{pattern}\.(\d+)\.", module):
                return int(match.group(1))
        return None


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Check numbers and switches."""
    alpha = _number("lora_alpha", values.pop("lora_alpha", 8))
    bias = values.pop("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {_short(bias)}; expected none, all or lora_only")
    return {
        "rank": _rank("r", values.pop("r", 8)),
        "alpha": alpha,
        "bias": bias,
        "rank_stabilized": _switch("use_rslora", values.pop("use_rslora", False)),
        "magnitude": _switch("use_dora", values.pop("use_dora", False)),
        "lora_bias": _switch("lora_bias", values.pop("lora_bias", False)),
    }


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    """Check names of modules and numbers of layers."""
    found: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules"):
        value = values.pop(field, None)
        if isinstance(value, str):
            found[field] = _pattern(field, value)
        else:
            found[field] = tuple(map(plain_name, _names(field, value)))
    if not found["target_modules"]:
        raise ValueError("target_modules is empty; expected names of modules")
    for field in ("layers_pattern", "modules_to_save"):
        value = values.pop(field, None)
        found[field] = _names(field, [value] if isinstance(value, str) else value)
    layers = values.pop("layers_to_transform", None)
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers_to_transform is {_short(layers)}; expected whole numbers")
    return found | {"layers": tuple(layers)}


def _patterns(values: dict[str, Any]) -> dict[str, Any]:
    """Check ranks and alphas of single modules."""
    found: dict[str, Any] = {}
    for field, check in (("rank_pattern", _rank), ("alpha_pattern", _number)):
        value = values.pop(field, None) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{field} is {_short(value)}; expected an object")
        found[field] = {_pattern(field, key): check(field, each) for key, each in value.items()}
    return found


def _rest(values: dict[str, Any]) -> dict[str, Any]:
    """Check that the remaining settings have no effect."""
    start = values.pop("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_INITIALIZERS):
        raise ValueError(
            f"init_lora_weights is {_short(start)}, which changes the base model's weights; save "
            "the adapter with peft's path_initial_model_for_weight_conversion"
        )
    for name, value in values.items():
        if name not in _WITHOUT_EFFECT and value:
            raise ValueError(
                f"{_short(name)} is {_short(value)}, which this program does not understand; merge "
                "the adapter with peft"
            )
    return {}


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None if names else False
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _names(field: str, value: Any) -> tuple[str, ...]:
    value = value or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{field} is {_short(value)}; expected a list of names")
    return tuple(value)


def _pattern(field: str, text: str) -> str:
    """A regular expression from a stranger, checked to compile and not to run for hours."""
    try:
        if len(text) > _MAX_PATTERN:
            raise ValueError("too long")
        if re.search(r"\)\s*[*+{]", text) or len(re.findall(r"[*+{]", text)) > _MAX_REPEATS:
            raise ValueError("too many repetitions")
        re.compile(text)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{field} is {_short(text)}, a regular expression that can't be used ({error}); give "
            "the modules by name"
        ) from None
    return text


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise ValueError(f"{field} is {_short(value)}; expected a whole number from 1")
    return value


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30 or value == 0:
        raise ValueError(f"{field} is {_short(value)}; expected a finite number other than 0")
    return float(value)


def _switch(field: str, value: Any) -> bool:
    if not isinstance(value, bool) and value is not None:
        raise ValueError(f"{field} is {_short(value)}; expected true or false")
    return bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain_name(name: str) -> str:
    """The name of a module or tensor without what peft, DDP, FSDP and torch.compile add."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_PEFT_PREFIX):
        name = name.removeprefix(_PEFT_PREFIX)
    return name.replace(".base_layer.", ".")


def listed(names: Iterable[str], *, most: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_short(name) for name in names[:most]) + more
