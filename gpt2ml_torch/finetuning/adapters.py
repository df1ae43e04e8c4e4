"""LoRA adapters as peft saves them: read, checked against a model, and merged into its file.

An adapter's tensors become changes of the model's weights in one pure function, `weight_changes`,
which is where the names of another library's modules are translated (`Place`). Every tensor must
have a place, and every module that the adapter's configuration names must have its tensors.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.export.names import HEAD, SCOPE, exported_modules
from gpt2ml_torch.finetuning.adapter_config import (
    MAX_CONFIG_BYTES,
    AdapterConfig,
    listed,
    plain_name,
)
from gpt2ml_torch.finetuning.adapter_places import Place, exported_places, own_places
from gpt2ml_torch.modelfile import ModelFile, ModelWriter

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its settings, and its tensors by the names in the file."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """What becomes of some rows of one weight: `replacement` in their place, then
    `scale * b @ a` added, then each row scaled to the length `magnitude` (DoRA).

    `a` is (rank, in) and `b` (out, rank).
    """

    first_row: int = 0
    rows: int = 0
    replacement: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def has_effect(self) -> bool:
        """Whether it can change a weight; an adapter that was never trained can't."""
        return self.replacement is not None or (
            self.a is not None and self.b is not None and bool(self.a.any() and self.b.any())
        )

    def apply(self, weight: Tensor) -> None:
        """Change a weight in place, computing in float32 or wider."""
        rows = weight[self.first_row : self.first_row + self.rows]
        if self.replacement is not None:
            rows.copy_(self.replacement)
        if self.a is None or self.b is None:
            return
        delta = (self.b @ self.a).mul_(self.scale).view(rows.shape)  # (out, in)
        if self.magnitude is None:
            rows += delta
            return
        changed = rows + delta
        rows.copy_((self.magnitude / torch.linalg.norm(changed, dim=1))[:, None] * changed)


def places_of(adapter: Adapter, config: GPT2MLConfig) -> dict[str, Place]:
    """The places of the model that an adapter was trained on: this one, or the exported class with
    its output layer or without. Where no tensor's name tells, the adapter's targets do.
    """
    own, exported = own_places(config), exported_places(config)
    headless = {name.removeprefix(SCOPE): place for name, place in exported.items()}
    models = (own, exported, headless)
    names = [plain_name(name) for name in adapter.tensors]
    for places in models:
        modules = tuple(f"{module}." for module in places)
        if any(name.startswith(modules) for name in names):
            return places
    targeted = (places for places in models if any(map(adapter.config.targets, places)))
    return next(targeted, own)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's folder; raises `OSError` and `ValueError` for one that can't be used."""
    folder = Path(folder)
    config_path, weights, pickled = (folder / name for name in (_CONFIG, _WEIGHTS, _PICKLED))
    if not config_path.is_file():
        raise OSError(
            errno.ENOENT, f"{folder} is no adapter: expected a folder with {_CONFIG} and {_WEIGHTS}"
        )
    if config_path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{config_path} is damaged: it has more than {MAX_CONFIG_BYTES} bytes")
    try:
        config = AdapterConfig.from_json(config_path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    path = weights if os.path.lexists(weights) else pickled
    if not os.path.lexists(path):
        raise OSError(errno.ENOENT, f"{folder} lacks {_WEIGHTS}; copy the adapter's folder again")
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    tensors = _read_safetensors(path) if path is weights else _read_pickle(path)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    return Adapter(folder, config, tensors)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({_first_line(error)}); copy it again or save the adapter again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """With PyTorch's restricted reader, which runs no code from the file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path} can't be read as a pickled adapter ({_first_line(error)}); save the adapter "
            "as safetensors"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise ValueError(f"{path} does not hold tensors by name; save the adapter as safetensors")
    return dict(found)


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"{path}: tensor {listed([name])} is not an ordinary tensor")
    if not tensor.dtype.is_floating_point:
        raise ValueError(
            f"{path}: tensor {listed([name])} is {str(tensor.dtype).removeprefix('torch.')}; "
            "expected floating-point numbers"
        )
    if tensor.numel() > max(1, tensor.untyped_storage().nbytes() // tensor.itemsize):
        raise ValueError(f"{path}: tensor {listed([name])} is larger than its data")
    if not tensor.float().isfinite().all():
        raise ValueError(
            f"{path}: tensor {listed([name])} holds NaN or infinite numbers; train the adapter "
            "again, or take an earlier checkpoint of it"
        )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# -- from an adapter's tensors to changes of weights ----------------------------------------------


def weight_changes(adapter: Adapter, places: Mapping[str, Place]) -> dict[str, list[WeightChange]]:
    """What an adapter changes, by the name of the model's parameter.

    `places` are the modules of the model that the adapter was trained on, by their names there.
    Raises `ValueError` for tensors without a place, for places without a tensor, and for shapes
    that don't fit.
    """
    tensors = _without_tied_head(_by_plain_name(adapter.tensors), places)
    shapes = _expected(adapter.config, places)
    nowhere = "target_modules in its configuration names no layer of the model"
    try:
        _check(tensors, shapes)
    except ValueError as error:
        raise ValueError(str(error) if shapes else f"{error}; {nowhere}") from None
    if not shapes:
        raise ValueError(nowhere)
    changes: dict[str, list[WeightChange]] = {}
    for name, place in places.items():
        for parameter, shape in place.shapes.items():
            change = _change(adapter.config, tensors, f"{name}.{parameter}", place)
            if change is not None:
                change = dataclasses.replace(change, first_row=place.first_row, rows=shape[0])
                changes.setdefault(f"{place.module}.{parameter}", []).append(change)
    return changes


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Tensors and their names in the file, by names without what wrappers put before a module's."""
    plain: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        short = plain_name(name)
        if short.endswith(".lora_magnitude_vector.weight"):  # peft saves it without the ending
            short = short.removesuffix(".weight")
        if short in plain:
            raise ValueError(f"{listed([plain[short][0], name])} name the same weight")
        plain[short] = name, tensor
    return plain


def _without_tied_head(
    tensors: dict[str, tuple[str, Tensor]], places: Mapping[str, Place]
) -> dict[str, tuple[str, Tensor]]:
    """The tensors without the output layer's, which the exported class has apart.

    Raises `ValueError` for an adapter that changes it or the token embedding alone.
    """
    embedding = exported_modules("token_embedding")[0]
    changed = {name for name in tensors if name.startswith((f"{embedding}.", "lm_head."))}
    if embedding not in places or not changed:
        return tensors
    name = f"{embedding}.weight"
    if changed != {HEAD, name} or not torch.equal(tensors[HEAD][1], tensors[name][1]):
        raise ValueError(
            f"it changes {listed(sorted(changed))}, and the model has one matrix for both the "
            "token embedding and the output layer; train it with modules_to_save=['embed_tokens'] "
            "and ensure_weight_tying=True"
        )
    return {name: value for name, value in tensors.items() if name != HEAD}


def _expected(config: AdapterConfig, places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """The tensors that an adapter of these settings must have, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        adapted = place.adaptable and config.targets(name)
        if adapted:
            shapes.update(_expected_of_target(config, name, place))
        for parameter, shape in place.shapes.items():
            has_bias = config.bias == "all" or (config.bias == "lora_only" and adapted)
            if config.saves(name) or (parameter == "bias" and has_bias):
                shapes[f"{name}.{parameter}"] = shape
    return shapes


def _expected_of_target(
    config: AdapterConfig, name: str, place: Place
) -> dict[str, tuple[int, ...]]:
    rank, (rows, columns) = config.rank_of(name), place.shapes["weight"]
    if place.is_embedding:
        if config.magnitude:
            raise ValueError("use_dora on an embedding is not understood; merge it with peft")
        return {
            f"{name}.lora_embedding_A": (rank, rows),
            f"{name}.lora_embedding_B": (columns, rank),
        }
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.lora_A.weight": (rank, columns),
        f"{name}.lora_B.weight": (rows, rank),
    }
    if config.magnitude:
        shapes[f"{name}.lora_magnitude_vector"] = (rows,)
    if config.lora_bias:
        shapes[f"{name}.lora_B.bias"] = (rows,)
    return shapes


def _check(
    tensors: Mapping[str, tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    unknown = [found for name, (found, _) in tensors.items() if name not in shapes]
    missing = [name for name in shapes if name not in tensors]
    faults = [
        f"{len(names)} {what} ({listed(names)})"
        for what, names in (
            ("tensors of the adapter without a place in the model", unknown),
            ("places in the model without a tensor of the adapter", missing),
        )
        if names
    ]
    if faults:
        raise ValueError("; ".join(faults))
    for name, (found, tensor) in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"tensor {listed([found])} has shape {tuple(tensor.shape)}; the model and the "
                f"adapter's rank make it {shapes[name]}"
            )


def _change(
    config: AdapterConfig, tensors: Mapping[str, tuple[str, Tensor]], name: str, place: Place
) -> WeightChange | None:
    """The change of one parameter, None for none."""
    module, _, parameter = name.rpartition(".")

    def get(key: str) -> Tensor | None:
        found = tensors.get(key)
        return None if found is None else found[1].to(_at_least_float32(found[1].dtype))

    replacement = get(name)
    if parameter == "weight" and place.is_embedding:
        a, b = get(f"{module}.lora_embedding_B"), get(f"{module}.lora_embedding_A")
        a, b = (None if a is None else a.T), (None if b is None else b.T)
    elif parameter == "weight":
        a, b = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
    else:  # a bias of B is added to the layer's own
        added = get(f"{module}.lora_B.bias")
        a, b = (None, None) if added is None else (added.new_ones(1, 1), added[:, None])
    if replacement is None and a is None:
        return None
    scale = config.scale_of(module)
    magnitude = get(f"{module}.lora_magnitude_vector") if parameter == "weight" else None
    return WeightChange(replacement=replacement, a=a, b=b, scale=scale, magnitude=magnitude)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize > 4 else torch.float32  # PyTorch promotes no 8-bit floats


# -- merging ---------------------------------------------------------------------------------------


def merge_adapter(
    model_path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    source: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model with an adapter added to its weights, in the dtype of its file.

    One tensor is in memory at a time. `source` says where the weights come from (by default the
    model's source and the adapter's name), `generation` holds defaults for `Generator` (by default
    the model's own). Raises `OSError` and `ValueError` for files that are missing, damaged or don't
    belong together; nothing is written then.
    """
    file = ModelFile.open(model_path)
    if file.packed is not None:
        raise ValueError(
            f"{model_path} holds {file.packed} weights, to which nothing can be added; "
            "give the file it was made from"
        )
    changes = _changes_of(adapter, file)
    with ModelWriter(
        out,
        file.config,
        dtype=file.dtype,
        vocab=file.vocab,
        source=source or {**file.source, "merged_adapter": Path(adapter).name},
        generation=file.generation if generation is None else generation,
        overwrite=overwrite,
    ) as writer:
        for name in file.tensors:
            weight = file.tensor(name)
            for change in changes.get(name, ()):
                change.apply(weight)
            if name in changes and not weight.isfinite().all():
                raise ValueError(
                    f"the adapter {adapter} makes {name} infinite or NaN in "
                    f"{str(weight.dtype).removeprefix('torch.')}; nothing was written"
                )
            writer.write(name, weight)


def _changes_of(adapter: str | os.PathLike[str], file: ModelFile) -> dict[str, list[WeightChange]]:
    """The changes that an adapter makes to this model; raises `ValueError` if it does not fit."""
    found = read_adapter(adapter)
    try:
        changes = weight_changes(found, places_of(found, file.config))
    except ValueError as error:
        raise ValueError(f"the adapter {adapter} does not fit {file.path}: {error}") from None
    if not any(change.has_effect for each in changes.values() for change in each):
        logger.warning("the adapter %s adds nothing: all its products are zero", adapter)
    return changes
