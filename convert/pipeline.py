"""Source to file: read, transpose, round, write and hash, side by side, with few tensors in memory
at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import configs, mapping, published
from convert.sources import Source, total_bytes
from convert.vocabulary import Vocabulary, find_vocabulary
from gpt2ml_torch.checkpoint import CheckpointWriter, expected_shapes
from gpt2ml_torch.config import MAX_LAYERS, GPT2MLConfig
from gpt2ml_torch.safetensors_writer import resolve_target

# Bytes of finished tensors that may wait for the disk; with those being made, the memory that
# conversion takes.
_IN_FLIGHT = 64 << 20
_MAX_FAULTS = 200  # named in one error; a hostile file may have millions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chose; `vocab` and `config` are files, None to look beside the source."""

    dtype: torch.dtype = torch.float32
    config: Path | None = None
    vocab: Path | None = None
    with_vocab: bool = True
    verify: bool = True
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was done, for the summary."""

    config: GPT2MLConfig
    source: dict[str, Any]
    tensors: int
    dropped: dict[str, int]
    vocabulary: Vocabulary | None
    notes: list[str]
    size: int
    seconds: float


Progress = Callable[[int, int], None]  # bytes done since the last call, bytes in all


def convert(
    source: Source, folder: Path, out: Path, options: Options, *, progress: Progress | None = None
) -> Report:
    """Convert a source, whose config.json and vocabulary are looked for in `folder`, to the file
    `out`.

    Raises `ValueError` for a source that is damaged or no complete model, and `OSError`.
    """
    started = time.monotonic()
    check_target(out, source.data_files, overwrite=options.overwrite)
    plan, config, notes, inventory = _inspect(source, folder, options)
    source.check()
    vocabulary = None
    if options.with_vocab:
        vocabulary = find_vocabulary(folder, options.vocab, config.vocab_size)
        notes += _vocabulary_notes(vocabulary, config)
    step = source.step()
    with (
        _hashing(source.data_files) as digest,
        CheckpointWriter(
            out,
            config,
            dtype=options.dtype,
            vocab=vocabulary.text if vocabulary else None,
            overwrite=options.overwrite,
        ) as writer,
    ):
        _copy(source, plan, config, writer, options.dtype, progress)
        origin = _identify(source, step, digest(), options, notes)
        writer.set_source(origin)
    if vocabulary and "published" in origin:
        notes += _published_vocabulary_notes(origin, vocabulary)
    return Report(
        config=config,
        source=origin,
        tensors=len(plan),
        dropped={reason: len(names) for reason, names in inventory.dropped.items()},
        vocabulary=vocabulary,
        notes=notes,
        size=out.stat().st_size,
        seconds=time.monotonic() - started,
    )


def check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise `OSError` where the output can't be written, or is the source itself."""
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise FileExistsError(f"{out} is the source itself; give another name")
    resolve_target(out, overwrite=overwrite)


def _inspect(
    source: Source, folder: Path, options: Options
) -> tuple[dict[str, mapping.Recipe], GPT2MLConfig, list[str], mapping.Inventory]:
    """The plan of the conversion, once the source is known to be a complete model."""
    inventory = mapping.take_inventory(source.entries, source.format)
    plan = mapping.recipes(min(inventory.layers, MAX_LAYERS), source.format)
    sizes = _sizes(source, plan, inventory)
    origin = options.config or configs.find_config(folder)
    given = configs.read_config(origin) if origin else {}
    config, notes = configs.merge(sizes, given, origin=origin)
    faults = mapping.find_faults(source.entries, plan, expected_shapes(config), inventory.unknown)
    if faults:
        raise ValueError(f"{source.name} is no complete GPT2_ML: {_enumerate(faults)}")
    plan = {key: plan[key] for key in expected_shapes(config)}
    return plan, config, notes, inventory


def _sizes(
    source: Source, plan: dict[str, mapping.Recipe], inventory: mapping.Inventory
) -> dict[str, int]:
    """The model's dimensions by its tensors' shapes."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        name = plan[key].sources[0]
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
    biases = [recipe.sources[0] for key, recipe in plan.items() if key.endswith("mlp.up.bias")]
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


def _copy(
    source: Source,
    plan: dict[str, mapping.Recipe],
    config: GPT2MLConfig,
    writer: CheckpointWriter,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Make each tensor here and write it in a second thread, with a bounded number of bytes between
    the two."""
    shapes = expected_shapes(config)
    total = total_bytes(
        source.entries, (name for recipe in plan.values() for name in recipe.sources)
    )
    pending: collections.deque[tuple[concurrent.futures.Future[None], Tensor]] = collections.deque()
    buffers = _Buffers()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            for key, recipe in plan.items():
                parts = [source.read(name) for name in recipe.sources]
                size = sum(part.nbytes for part in parts)
                tensor = _make(key, recipe, parts, shapes[key], dtype, buffers)
                del parts
                while pending and sum(t.nbytes for _, t in pending) + tensor.nbytes > _IN_FLIGHT:
                    _finish(pending, buffers)
                pending.append((pool.submit(writer.write, key, tensor), tensor))
                del tensor
                if progress:
                    progress(size, total)
            while pending:
                _finish(pending, buffers)
        finally:
            for future, _ in pending:
                future.cancel()


def _finish(
    pending: collections.deque[tuple[concurrent.futures.Future[None], Tensor]], buffers: _Buffers
) -> None:
    future, tensor = pending.popleft()
    future.result()
    buffers.give_back(tensor)


class _Buffers:
    """Memory used over and over: the kernel takes longer to hand out fresh pages than a transpose
    to fill them."""

    def __init__(self) -> None:
        self._lent: dict[int, Tensor] = {}
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        for index, buffer in enumerate(self._free):
            if buffer.nbytes >= size:
                del self._free[index]
                break
        else:
            if self._free:
                self._free.pop()
            buffer = torch.empty(size, dtype=torch.uint8)
        tensor = buffer[:size].view(dtype).view(shape)
        self._lent[tensor.data_ptr()] = buffer
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """Take back what was lent; anything else is none of ours."""
        buffer = self._lent.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)


def _make(
    key: str,
    recipe: mapping.Recipe,
    parts: list[Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    buffers: _Buffers,
) -> Tensor:
    """The file's tensor from the source's."""
    if len(parts) == 1 and not recipe.transpose:
        exact = parts[0]
    else:
        common = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        exact = buffers.take(shape, common)
        recipe.apply(parts, exact)
    if exact.dtype == dtype:
        return exact
    rounded = buffers.take(shape, dtype)
    _round(key, exact, rounded)
    buffers.give_back(exact)
    return rounded


def _round(key: str, exact: Tensor, out: Tensor) -> None:
    """Round to nearest, once. Raises `ValueError` where a finite number becomes infinite."""
    if exact.dtype == torch.float64 and out.dtype.itemsize == 2:
        exact = _to_odd_float32(exact)
    out.copy_(exact)
    if not out.isfinite().all() and (out.isinf() & exact.isfinite()).any():
        largest = exact[exact.isfinite()].abs().max().item()
        name = str(out.dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor {key!r} has values up to {largest:.6g}, beyond {name}'s "
            f"{torch.finfo(out.dtype).max:.6g}; choose a wider --dtype, bfloat16 or float32"
        )


def _to_odd_float32(exact: Tensor) -> Tensor:
    """Round float64 to float32 so that rounding again, to 16 bits, gives what one rounding would.

    Inexact results get an odd last bit, which no later tie can mistake (Boldo and Melquiond, 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    nearest = exact.float()
    bits = nearest.view(torch.int32)
    away = nearest.double().abs() > exact.abs()
    inexact = nearest.double() != exact
    finite = exact.isfinite()
    return torch.where(finite, (bits - away.int()) | inexact.int(), bits).view(torch.float32)


@contextlib.contextmanager
def _hashing(files: list[Path]) -> Iterator[Callable[[], str | None]]:
    """Hash the data file in a thread of its own; several shards have no one hash."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if len(files) != 1:
            yield lambda: None
            return
        future = pool.submit(published.file_sha256, files[0], stop)
        try:
            yield future.result
        finally:
            stop.set()


def _identify(
    source: Source, step: int | None, sha256: str | None, options: Options, notes: list[str]
) -> dict[str, Any]:
    """What the file will say of its origin.

    Raises `ValueError` for a data file of a published size with another hash.
    """
    origin: dict[str, Any] = {"name": source.name}
    if step is not None:
        origin["step"] = step
    if sha256 is None:
        return origin
    origin["sha256"] = sha256
    if known := published.by_hash(sha256):
        # The same words for TensorFlow's and PyTorch's copy, which hold the same weights.
        step = int(known.prefix.rpartition("-")[2])
        return {
            "name": known.prefix,
            "step": step,
            "sha256": known.data_sha256,
            "published": known.name,
        }
    size = sum(path.stat().st_size for path in source.data_files)
    if source.format == "tf" and (known := published.by_size(size)):
        what = (
            f"{source.data_files[0]} has the size of the published {known.name} but another "
            "SHA-256, "
            f"{sha256} instead of {known.data_sha256}"
        )
        if options.verify:
            raise ValueError(
                f"{what}: the download is damaged (fetch it again), or it is another training "
                "(--no-verify goes on)"
            )
        notes.append(what)
    return origin


def _vocabulary_notes(vocabulary: Vocabulary, config: GPT2MLConfig) -> list[str]:
    spare = config.vocab_size - vocabulary.lines
    return (
        [f"{spare} rows of the embedding have no token (reserved; never produced)"] if spare else []
    )


def _published_vocabulary_notes(origin: dict[str, Any], vocabulary: Vocabulary) -> list[str]:
    known = next(known for known in published.PUBLISHED if known.name == origin["published"])
    if published.vocabulary_matches(known, vocabulary.text):
        return []
    return [f"{vocabulary.path} has the right number of lines, but is not the published vocabulary"]
