"""Source to file: read, transpose, round, write and hash, in a few threads that each take one
tensor at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import published
from convert.locate import Location
from convert.mapping import Recipe
from convert.plan import Options, Plan, make_plan
from convert.rounding import round_to
from convert.sources import Array, Source, storage
from convert.transpose import rows_in_order
from convert.vocabulary import Vocabulary
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.disk import resolve_target
from gpt2ml_torch.modelfile.format import SLOT
from gpt2ml_torch.modelfile.writer import ModelWriter

_WORKERS = 2  # more only wait for each other, since the kernel lets one at a time write to a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was done, for the summary."""

    config: GPT2MLConfig
    source: dict[str, Any]
    tensors: int
    kept: int  # optimiser slots
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
    with _hashing(location, options) as digest:  # it takes as long as all the rest
        source = open_source(location)
        plan = make_plan(source, location.folder, options)
        check_target(out, plan.inputs, overwrite=options.overwrite)
        with ModelWriter(
            out,
            plan.config,
            dtype=options.dtype,
            packed=options.quantization,
            vocab=plan.vocabulary.text if plan.vocabulary else None,
            slots=options.keep_optimizer,
            overwrite=options.overwrite,
        ) as writer:
            _copy(source, plan, writer, options, progress)
            origin = _identify(source, digest())
            writer.set_source(origin)
    notes = plan.notes
    if plan.vocabulary:
        notes = notes + _vocabulary_notes(plan.vocabulary, plan.config, origin)
    return Report(
        config=plan.config,
        source=origin,
        tensors=len(plan.recipes),
        kept=sum(len(recipe.sources) for recipe in plan.slots.values()),
        dropped={reason: len(names) for reason, names in plan.dropped.items()},
        vocabulary=plan.vocabulary,
        notes=notes,
        size=out.stat().st_size,
        seconds=time.monotonic() - started,
    )


def open_source(location: Location) -> Source:
    """Open a checkpoint for reading."""
    if location.kind == "bin":
        from convert.bin_source import BinSource  # brings PyTorch, which takes seconds to import

        return BinSource(location.path)
    from convert.tf_source import TFSource

    return TFSource(location)


def check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise `OSError` where the output can't be written, `ValueError` if it is an input itself."""
    for path in inputs:
        if out.exists() and out.samefile(path):
            raise ValueError(f"{out} is the source itself; give another name")
    resolve_target(out, overwrite=overwrite)


def _copy(
    source: Source,
    plan: Plan,
    writer: ModelWriter,
    options: Options,
    progress: Progress | None,
) -> None:
    """Make and write all tensors; the first that fails stops the others."""
    jobs = collections.deque([(key, recipe, options.dtype) for key, recipe in plan.recipes.items()])
    jobs.extend((SLOT + name, recipe, "float32") for name, recipe in plan.slots.items())
    sizes = {key: _bytes_made(source, recipe, dtype) for key, recipe, dtype in jobs}
    total = sum(sizes.values())
    reporting = threading.Lock()

    def work() -> None:
        while jobs:
            try:
                key, recipe, dtype = jobs.popleft()
            except IndexError:  # another took the last one
                return
            _write(writer, key, _pieces(source, key, recipe, dtype), options.quantization)
            if progress:
                with reporting:
                    progress(sizes[key], total)

    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        workers = [pool.submit(work) for _ in range(_WORKERS)]
        try:
            for worker in concurrent.futures.as_completed(workers):
                worker.result()
        finally:
            jobs.clear()


def _bytes_made(source: Source, recipe: Recipe, dtype: str) -> int:
    numbers = sum(math.prod(source.entries[name][1]) for name in recipe.sources)
    return numbers * storage(dtype).itemsize


def _pieces(source: Source, key: str, recipe: Recipe, dtype: str) -> Iterator[Array]:
    """A tensor of the file from the source's, some rows at a time."""
    for name in recipe.sources:
        tensor = source.read(name)
        for rows in rows_in_order(tensor.T if recipe.transpose else tensor):
            try:
                yield round_to(dtype, rows)
            except ValueError as error:
                raise ValueError(
                    f"tensor {key!r} has {error}; choose --dtype float32 or bfloat16"
                ) from None


def _write(
    writer: ModelWriter, key: str, pieces: Iterator[Array], quantization: str | None
) -> None:
    if quantization is None:
        writer.write_pieces(key, pieces)
        return
    import torch  # takes seconds to import, and only packing needs it

    writer.write_weight(key, torch.from_numpy(np.concatenate(list(map(np.copy, pieces)))))


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
