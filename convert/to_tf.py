"""The way back: from the one file to a TensorFlow checkpoint that the original code reads."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from convert import configs, mapping
from convert.tf_writer import Entry, write_tf_checkpoint
from gpt2ml_torch.checkpoint import CheckpointMetadata, read_metadata
from gpt2ml_torch.safetensors_reader import TensorInfo

_STATE = 'model_checkpoint_path: "{0}"\nall_model_checkpoint_paths: "{0}"\n'


def to_tf(
    source: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write `model.ckpt-STEP.*`, `checkpoint`, config.json and vocab.txt into a folder; returns the
    summary.

    The weights are float32, whatever the file's dtype. Raises as `read_metadata` does, and
    `FileExistsError`.
    """
    started = time.monotonic()
    metadata = read_metadata(source)
    if metadata.quantization is not None:
        raise ValueError(
            f"{source} is quantised ({metadata.quantization}), which TensorFlow's checkpoints "
            "don't know; give the file that it was made from"
        )
    step = metadata.source.get("step", 0)
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"{source}: step {step!r} in its source is no step of a training")
    prefix = f"model.ckpt-{step}"
    _check_folder(folder, prefix, metadata, overwrite)
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    # Beside the final place, so that the last step is a rename; what a killed run leaves is a
    # hidden folder.
    scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder))
    try:
        names = _write_all(scratch, prefix, source, metadata, step, progress)
        for name in names:  # `checkpoint` is last: until then nothing points to the new files
            (scratch / name).replace(folder / name)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    scratch.rmdir()
    size = sum((folder / name).stat().st_size for name in names)
    return "\n".join(
        [
            f"{folder / prefix}: {metadata.config.num_parameters:,} parameters, float32, step "
            f"{step:,}",
            f"  files       {', '.join(names)}",
            f"  written     {size:,} bytes in {time.monotonic() - started:.1f} s, read back and "
            "compared",
            "next: give this folder to the original code, or to python -m convert",
        ]
    )


def _check_folder(folder: Path, prefix: str, metadata: CheckpointMetadata, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; --to-tf writes a folder")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder {folder.absolute().parent} does not exist; create it first"
        )
    existing = [name for name in _file_names(prefix, metadata) if (folder / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{folder} has {', '.join(existing)} already")


def _file_names(prefix: str, metadata: CheckpointMetadata) -> list[str]:
    """All files, in the order in which they get their names."""
    files = [f"{prefix}.{suffix}" for suffix in ("data-00000-of-00001", "index", "meta")]
    vocabulary = ["vocab.txt"] if metadata.vocab is not None else []
    return [*files, "config.json", *vocabulary, "checkpoint"]


def _write_all(
    folder: Path,
    prefix: str,
    source: Path,
    metadata: CheckpointMetadata,
    step: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    entries = dict(_entries(source, metadata))
    entries[mapping.TF_STEP] = Entry.of(torch.tensor(step, dtype=torch.int64))
    total = 4 * metadata.config.num_parameters
    write_tf_checkpoint(
        folder / prefix,
        entries,
        meta_graph=True,
        progress=(lambda done: progress(done, total)) if progress else None,
    )
    config = json.dumps(configs.original_dialect(metadata.config), indent=2)
    (folder / "config.json").write_text(config + "\n")
    if metadata.vocab is not None:
        (folder / "vocab.txt").write_bytes(metadata.vocab.encode())
    (folder / "checkpoint").write_text(_STATE.format(prefix))
    return _file_names(prefix, metadata)


def _entries(source: Path, metadata: CheckpointMetadata) -> Iterator[tuple[str, Entry]]:
    """The variables by their TensorFlow names, each read from the file when it is wanted."""
    for key, recipe in mapping.recipes(metadata.config.num_hidden_layers, "tf").items():
        info = metadata.tensors[key]
        shape = recipe.source_shape(info.shape)
        for index, name in enumerate(recipe.sources):
            load = functools.partial(_load, source, info, recipe, index)
            yield name, Entry(torch.float32, shape, load)


def _load(source: Path, info: TensorInfo, recipe: mapping.Recipe, index: int) -> bytearray:
    """One variable's bytes; read rather than mapped, since mapped pages count as memory too."""
    content = bytearray(info.end - info.start)
    with source.open("rb") as file:
        file.seek(info.start)
        if file.readinto(content) != len(content):
            raise OSError(f"{source} became shorter while it was read")
    tensor = torch.frombuffer(content, dtype=info.dtype).view(info.shape)
    if info.dtype == torch.float32 and len(recipe.sources) == 1 and not recipe.transpose:
        return content
    part = list(recipe.invert(tensor))[index][1]
    result = bytearray(part.numel() * 4)
    torch.frombuffer(result, dtype=torch.float32).view(part.shape).copy_(part)
    return result
