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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import configs, mapping, published
from convert.locate import Location
from convert.sources import BinSource, Source, total_bytes
from convert.vocabulary import Vocabulary, find_vocabulary
from gpt2ml_torch.checkpoint import CheckpointWriter
from gpt2ml_torch.config import MAX_LAYERS, GPT2MLConfig
from gpt2ml_torch.layout import expected_shapes
from gpt2ml_torch.safetensors_writer import resolve_target

# Bytes of finished tensors that may wait for the disk; with those being made, the memory that
# conversion takes.
_IN_FLIGHT = 80 << 20
_ROUND_CHUNK = 1 << 20  # numbers
_WRITERS = 2  # while one waits for the kernel the other compares
_MAX_FAULTS = 200  # named in one error; a hostile file may have millions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chose; `vocab` and `config` are files, None to look beside the source."""

    dtype: torch.dtype = torch.float32
    quantization: str | None = None  # of the large matrices; `dtype` is then that of the rest
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
    location: Location, out: Path, options: Options, *, progress: Progress | None = None
) -> Report:
    """Convert a checkpoint, with the config.json and the vocabulary beside it, to the file `out`.

    Raises `ValueError` for a source that is damaged or no complete model, and `OSError`.
    """
    started = time.monotonic()
    check_target(out, location.files(), overwrite=options.overwrite)
    with _hashing(location, options) as digest:  # it takes a while: TensorFlow starts beside it
        source = open_source(location)
        job = _prepare(source, location.folder, options)
        check_target(out, job.inputs, overwrite=options.overwrite)
        with CheckpointWriter(
            out,
            job.config,
            dtype=options.dtype,
            quantization=options.quantization,
            vocab=job.vocabulary.text if job.vocabulary else None,
            overwrite=options.overwrite,
        ) as writer:
            _copy(source, job, writer, options.dtype, progress)
            origin = _identify(source, digest())
            writer.set_source(origin)
    notes = job.notes
    if job.vocabulary:
        notes = notes + _vocabulary_notes(job.vocabulary, job.config, origin)
    return Report(
        config=job.config,
        source=origin,
        tensors=len(job.plan),
        dropped={reason: len(names) for reason, names in job.dropped.items()},
        vocabulary=job.vocabulary,
        notes=notes,
        size=out.stat().st_size,
        seconds=time.monotonic() - started,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be done, once the source is known to be a complete model with its vocabulary."""

    plan: dict[str, mapping.Recipe]
    config: GPT2MLConfig
    vocabulary: Vocabulary | None
    dropped: dict[str, list[str]]
    notes: list[str]
    inputs: list[Path]


def open_source(location: Location) -> Source:
    """Open a checkpoint for reading."""
    if location.kind == "bin":
        return BinSource(location.path)
    from convert.tf_source import TFSource  # takes seconds to import, and a .bin needs none of it

    return TFSource(location)


def _prepare(source: Source, folder: Path, options: Options) -> _Job:
    inventory = mapping.take_inventory(source.entries, source.format)
    plan = mapping.recipes(min(inventory.layers, MAX_LAYERS), source.format)
    sizes = _sizes(source, plan, inventory)
    origin = options.config or configs.find_config(folder)
    given = configs.read_config(origin) if origin else {}
    config, notes = configs.merge(sizes, given, origin=origin)
    shapes = expected_shapes(config)
    faults = mapping.find_faults(source.entries, plan, shapes, inventory.unknown)
    if faults:
        raise ValueError(f"{source.name} is no complete GPT2_ML: {_enumerate(faults)}")
    source.check()
    vocabulary = None
    if options.with_vocab:
        vocabulary = find_vocabulary(folder, options.vocab, config.vocab_size)
    return _Job(
        plan={key: plan[key] for key in shapes},
        config=config,
        vocabulary=vocabulary,
        dropped=inventory.dropped,
        notes=notes,
        inputs=[path for path in (origin, vocabulary and vocabulary.path) if path],
    )


def check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise `OSError` where the output can't be written, or is the source itself."""
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise FileExistsError(f"{out} is the source itself; give another name")
    resolve_target(out, overwrite=overwrite)


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
    job: _Job,
    writer: CheckpointWriter,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Copy the layers, then the embeddings: TensorFlow keeps what its largest tensor took."""
    sizes = {key: total_bytes(source.entries, r.sources) for key, r in job.plan.items()}
    total = sum(sizes.values())
    in_layers = {key: size for key, size in sizes.items() if key.startswith("blocks.")}
    outside = {key: size for key, size in sizes.items() if key not in in_layers}

    def report(done: int) -> None:
        if progress:
            progress(done, total)

    _copy_group(source, job, in_layers, writer, dtype, report)
    _copy_group(source, job, outside, writer, dtype, report)


def _copy_group(
    source: Source,
    job: _Job,
    sizes: Mapping[str, int],
    writer: CheckpointWriter,
    dtype: torch.dtype,
    report: Callable[[int], None],
) -> None:
    """Make each tensor here and write it in other threads, a bounded number of bytes at a time."""
    shapes = expected_shapes(job.config)
    pending: collections.deque[tuple[concurrent.futures.Future[None], Tensor]] = collections.deque()
    buffers = _Buffers(max(sizes.values()))
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for key, size in sizes.items():
                while pending and sum(t.nbytes for _, t in pending) + size > _IN_FLIGHT:
                    _finish(pending, buffers)
                tensor = _make(source, key, job.plan[key], shapes[key], dtype, buffers)
                pending.append((pool.submit(writer.write_weight, key, tensor), tensor))
                del tensor
                report(size)
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
    """Memory used over and over, since fresh pages cost the kernel more than filling them costs us.

    All are of one size, enough for any tensor of the group.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lent: dict[int, Tensor] = {}
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > self._size:  # joined from several dtypes, the wider one counts
            return torch.empty(shape, dtype=dtype)
        buffer = self._free.pop() if self._free else torch.empty(self._size, dtype=torch.uint8)
        self._lent[buffer.data_ptr()] = buffer
        return buffer[:size].view(dtype).view(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Take back what was lent; anything else is none of ours."""
        buffer = self._lent.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)


def _make(
    source: Source,
    key: str,
    recipe: mapping.Recipe,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    buffers: _Buffers,
) -> Tensor:
    """The file's tensor from the source's."""
    if len(recipe.sources) == 1 and not recipe.transpose:
        exact, ours = source.read(recipe.sources[0]), source.gives_away
    else:
        dtypes = [source.entries[name][0] or torch.float32 for name in recipe.sources]
        exact, ours = buffers.take(shape, functools.reduce(torch.promote_types, dtypes)), True
        recipe.apply(map(source.read, recipe.sources), exact)
    return exact if exact.dtype == dtype else _round(key, exact, dtype, in_place=ours)


def _round(key: str, exact: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Round to nearest, once; in place where it fits, so that no second tensor is needed.

    Raises `ValueError` where a finite number becomes infinite.
    """
    flat = exact.contiguous().view(-1)
    if in_place and dtype.itemsize <= exact.dtype.itemsize:
        out = flat.view(torch.uint8)[: len(flat) * dtype.itemsize].view(dtype)
    else:
        out = torch.empty(len(flat), dtype=dtype)
    for start in range(0, len(flat), _ROUND_CHUNK):
        piece = flat[start : start + _ROUND_CHUNK]
        rounded = _to_odd_float32(piece) if _rounds_twice(piece.dtype, dtype) else piece
        rounded = rounded.to(dtype)
        if rounded.isinf().any() and (rounded.isinf() & piece.isfinite()).any():
            largest = piece[piece.isfinite()].abs().max().item()
            raise ValueError(
                f"tensor {key!r} has values like {largest:.6g}, beyond the largest of "
                f"{_name(dtype)}, {torch.finfo(dtype).max:.6g}; choose --dtype float32 or bfloat16"
            )
        out[start : start + len(piece)] = rounded  # never past the piece that it was made from
    return out.view(exact.shape)


def _rounds_twice(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether PyTorch converts through float32."""
    return source == torch.float64 and target.itemsize == 2


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
def _hashing(location: Location, options: Options) -> Iterator[Callable[[], str | None]]:
    """Hash the data file, if it may be a published one, in a thread of its own."""
    files = location.data_files()
    if not options.verify or len(files) != 1 or not _may_be_published(files[0], location):
        yield lambda: None
        return
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(published.file_sha256, files[0], stop)
        try:
            yield future.result
        finally:
            stop.set()


def _may_be_published(file: Path, location: Location) -> bool:
    return published.may_be(file.stat().st_size, location.kind)


def _identify(source: Source, sha256: str | None) -> dict[str, Any]:
    """What the file will say of its origin.

    Raises `ValueError` for a data file of a published size with another hash.
    """
    origin: dict[str, Any] = {"name": source.name}
    step = source.step()
    if step is not None:
        origin["step"] = step
    if sha256 is None:
        return origin
    if known := published.by_hash(sha256):
        # The same words for TensorFlow's and PyTorch's copy, which hold the same weights.
        return known.source()
    size = sum(path.stat().st_size for path in source.data_files)
    if source.format == "tf" and (known := published.by_size(size)):
        raise ValueError(
            f"{source.data_files[0]} has the size of the published {known.name} but another "
            f"SHA-256, {sha256} instead of {known.data_sha256}: the download is damaged (fetch it "
            "again), or this is another training (--no-verify goes on)"
        )
    return {**origin, "sha256": sha256}


def _vocabulary_notes(
    vocabulary: Vocabulary, config: GPT2MLConfig, origin: dict[str, Any]
) -> list[str]:
    notes = []
    if spare := config.vocab_size - vocabulary.lines:
        notes.append(f"{spare} rows of the embedding have no token (reserved; never produced)")
    known = published.by_hash(origin["sha256"]) if "published" in origin else None
    if known and not published.vocabulary_matches(known, vocabulary.text):
        notes.append(f"{vocabulary.path} has the right length, but is not the published vocabulary")
    return notes
