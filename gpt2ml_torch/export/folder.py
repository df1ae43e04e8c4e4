"""Export a model file to a folder that transformers and the programs around it load.

Memory holds one tensor at a time. The folder is built under another name and renamed when it is
complete, so a process killed at any moment leaves no half-written folder under the final name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from gpt2ml_torch import disk
from gpt2ml_torch.export import documents
from gpt2ml_torch.export.names import MODEL_TYPE, exported_names, exported_shapes
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.modelfile.format import byte_size, expected_shapes
from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.modelfile.writer import SafetensorsWriter
from gpt2ml_torch.options import OptionError, OptionFileExistsError, check_options, option

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MAX_SHARD = 1 << 62  # bytes; no file is larger
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial(\.lock)?)?")
_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "model.safetensors.index.json", *documents.CODE_FILES),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export. Raises `ValueError`, naming the field, for values that make no sense."""

    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = option(
        None, help="precision of the exported weights", default_text="as in the file"
    )
    shard_size: str = option(
        "5GB", metavar="SIZE", help="split larger weights into files of at most this size"
    )
    code: bool = option(
        True,
        flags="--no-code",
        inverted=True,
        help="leave out the model's Python code; such a folder loads only where gpt2ml_torch is "
        "installed, after `import gpt2ml_torch.hf`",
    )
    overwrite: bool = option(False, flags="--force", help="replace an exported folder")

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.shard_bytes

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; raises `ValueError` for text that is not a size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?i?B)?", self.shard_size.strip(), re.I)
        size = float(match[1]) * _UNITS[(match[2] or "").upper().removeprefix("B")] if match else 0
        if not 1 <= size < _MAX_SHARD:
            raise OptionError(
                "{shard_size} is {!r}; expected a size such as 5GB, 500MB or 1GiB", self.shard_size
            )
        return int(size)


def export_folder(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: ExportOptions | None = None,
) -> Path:
    """Write a model file as a folder for transformers, and return the folder's real path.

    Raises `ValueError` for a model file that can't be exported, and `OSError` if the folder
    can't be written (`FileExistsError` if it exists and `overwrite` is false).
    """
    options = options or ExportOptions()
    target = _resolve_folder(folder, overwrite=options.overwrite)
    if target == Path(os.path.realpath(model)).parent:
        raise ValueError(
            f"{model} is in the folder {target}, which would be replaced; give another folder"
        )
    with ModelFile.open(model) as file:
        if file.packed is not None:
            raise ValueError(
                f"{model} holds {file.packed} weights, which other programs can't read; export the "
                "file that it was made from"
            )
        dtype = options.dtype or file.dtype.value
        with _unfinished(target) as partial:
            for name, text in _small_files(file, dtype, options.code).items():
                disk.write_synced(partial / name, text)
            _write_weights(file, partial, dtype, options.shard_bytes)
            disk.sync_directory(partial)
            _replace(partial, target)
    return target


# -- content --------------------------------------------------------------------------------------


def _small_files(file: ModelFile, dtype: str, code: bool) -> dict[str, str]:
    config, source, defaults = file.config, file.source, file.generation
    GenerationConfig.from_dict(defaults)  # raises: other programs would fail later, or ignore it
    tokenizer = None if file.vocab is None else file.tokenizer()
    values = documents.config_json(config, dtype=dtype, code=code, source=source, defaults=defaults)
    generation = documents.generation_config_json(config, tokenizer, defaults)
    return {
        "config.json": documents.to_json(values),
        "generation_config.json": documents.to_json(generation),
        "README.md": documents.model_card(config, dtype=dtype, code=code, source=source),
        **(documents.code_files() if code else {}),
        **(documents.tokenizer_files(tokenizer, config) if tokenizer is not None else {}),
    }


def _write_weights(file: ModelFile, folder: Path, dtype: str, shard_bytes: int) -> None:
    shapes = exported_shapes(file.config)
    sizes = {name: byte_size((dtype, shape)) for name, shape in shapes.items()}
    disk.check_room(folder, sum(sizes.values()))
    shards = _plan_shards(list(expected_shapes(file.config)), sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        many = len(shards) > 1
        shard = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        )
        parts = [part for name in names for part in exported_names(name)]
        weight_map.update(dict.fromkeys(parts, shard))
        specs = {part: (dtype, shapes[part]) for part in parts}
        with SafetensorsWriter(folder / shard, specs, {"format": "pt"}) as writer:
            for name in names:
                _write_weight(writer, name, file.tensor(name), dtype)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        disk.write_synced(folder / "model.safetensors.index.json", documents.to_json(index))


def _write_weight(writer: SafetensorsWriter, name: str, tensor: torch.Tensor, dtype: str) -> None:
    converted = tensor.to(getattr(torch, dtype))
    if not converted.isfinite().all():
        if tensor.isfinite().all():
            raise ValueError(
                f"tensor {name!r} has values that {dtype} can't hold; choose another dtype"
            )
        raise ValueError(
            f"tensor {name!r} has NaN or infinity, so the model would write nonsense; convert or "
            "fetch the file again"
        )
    parts = exported_names(name)
    for part, rows in zip(parts, converted.chunk(len(parts)), strict=True):
        writer.write_pieces(part, [rows.contiguous().view(-1).view(torch.uint8).numpy()])


def _plan_shards(
    names: Sequence[str], sizes: Mapping[str, int], shard_bytes: int
) -> list[list[str]]:
    """Our weights' names for each shard, in order; all parts of a weight go into one shard."""
    shards: list[list[str]] = []
    room = 0
    for name in names:
        size = sum(sizes[part] for part in exported_names(name))
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


# -- the folder -----------------------------------------------------------------------------------


def _resolve_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The real path of the folder to write; raises `OSError` if it can't be written there."""
    target = Path(os.path.realpath(path))
    disk.check_parent(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"can't write {target}: it is not a folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise OptionFileExistsError(
                "{} exists already; give another name, or {overwrite=True} to replace it", target
            )
        if not _is_ours(target) or not _holds_our_model(target):
            raise OSError(
                errno.EEXIST,
                f"{target} holds something other than an exported model; give another folder, or "
                "remove it",
            )
    return target


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds only files that an export writes."""
    return all(
        (_WEIGHTS.fullmatch(entry.name) or entry.name in _SMALL_FILES) and entry.is_file()
        for entry in folder.iterdir()
    )


def _holds_our_model(folder: Path) -> bool:
    """Whether a folder's config.json, if there is one, describes an exported model."""
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A new folder beside the target, in which it is built; removed after an error."""
    partial = target.with_name(target.name + ".partial")
    lock = disk.lock(
        partial.with_name(partial.name + ".lock"),
        f"another process is writing {target}; wait for it to end",
    )
    try:
        _remove(partial)  # what a killed process left
        partial.mkdir()
        yield partial
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
        disk.unlock(lock)


def _remove(folder: Path) -> None:
    """Remove a folder that an export left, if it exists; raises `OSError` for anything else."""
    if not folder.is_symlink() and not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir() or not _is_ours(folder):
        raise OSError(errno.EEXIST, f"{folder} is in the way; remove it")
    shutil.rmtree(folder)


def _replace(partial: Path, target: Path) -> None:
    """Give the complete folder its final name, in place of an older one."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        _remove(old)
        os.rename(target, old)
    os.rename(partial, target)
    disk.sync_directory(target.parent)
    _remove(old)
