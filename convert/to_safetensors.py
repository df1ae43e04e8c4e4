"""From a checkpoint to the one file: read, transpose, round, write and hash, in a few threads that
each take one tensor at a time."""

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
from convert.inputs import Location
from convert.mapping import TENSORFLOW, Recipe
from convert.plan import Options, Plan, make_plan
from convert.source import (
    Array,
    Joined,
    Source,
    count_non_finite,
    round_to,
    rows_in_order,
    storage_dtype,
)
from convert.vocabulary import Vocabulary
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.disk import resolve_target
from gpt2ml_torch.modelfile.format import SLOT
from gpt2ml_torch.modelfile.writer import ModelWriter
from gpt2ml_torch.options import OptionError

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
    verified: str  # what of the source was compared with a checksum, in words
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
    check_target(out, location.files, overwrite=options.overwrite)
    source = open_source(location)
    with _hashing(source, options) as digest:  # it takes as long as all the rest
        plan = make_plan(source, location.folder, options)
        check_target(out, [*source.files, *plan.inputs], overwrite=options.overwrite)
        with ModelWriter(
            out,
            plan.config,
            dtype=options.unpacked_dtype,
            packed=options.packed,
            vocab=plan.vocabulary.text if plan.vocabulary else None,
            source=plan.source,
            generation=plan.generation,
            slots=options.keep_optimizer,
            overwrite=options.overwrite,
            allow_non_finite=True,  # checked before rounding and packing
        ) as writer:
            non_finite = _copy(source, plan, writer, options, progress)
            source.verify_rest()
            origin = _identify(source, digest())
            # Of an exported folder: it may have been trained since.
            writer.set_source({**plan.source, "imported": origin} if plan.source else origin)
    notes = [*location.notes, *source.notes, *plan.notes, *non_finite]
    if plan.vocabulary:
        notes += _vocabulary_notes(plan.vocabulary, plan.config, origin)
    return Report(
        config=plan.config,
        source=origin,
        tensors=len(plan.recipes),
        kept=sum(len(recipe.sources) for recipe in plan.slots.values()),
        dropped=plan.dropped,
        vocabulary=plan.vocabulary,
        verified=_verified(source, origin),
        notes=notes,
        size=out.stat().st_size,
        seconds=time.monotonic() - started,
    )


def open_source(location: Location) -> Source:
    """Open a checkpoint for reading.

    Raises `ValueError` for one that is damaged or hostile, and `OSError`.
    """
    if location.kind == "tf":
        from convert.tensorflow import TensorFlowCheckpoint

        return TensorFlowCheckpoint(location.path)
    if location.kind == "bin":
        from convert.pytorch_bin import PyTorchFile as File
    else:
        from convert.safetensors_file import SafetensorsFile as File  # type: ignore[assignment]
    sources = [File(path) for path in location.files]
    return sources[0] if len(sources) == 1 else Joined(location.path.name, sources)


def check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise `OSError` where the output can't be written, `ValueError` if it is an input itself."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{out} is the source itself; give another name")
    resolve_target(out, overwrite=overwrite)


def _copy(
    source: Source,
    plan: Plan,
    writer: ModelWriter,
    options: Options,
    progress: Progress | None,
) -> list[str]:
    """Make and write all tensors; the first that fails stops the others.

    Returns a note for each that is not finite, where that is allowed.
    """
    jobs = collections.deque(
        [(key, recipe, options.unpacked_dtype) for key, recipe in plan.recipes.items()]
    )
    jobs.extend((SLOT + name, recipe, "float32") for name, recipe in plan.slots.items())
    sizes = {key: _bytes_made(source, recipe, dtype) for key, recipe, dtype in jobs}
    total = sum(sizes.values())
    reporting = threading.Lock()
    notes: list[str] = []

    def work() -> None:
        while jobs:
            try:
                key, recipe, dtype = jobs.popleft()
            except IndexError:  # another took the last one
                return
            maker = _Maker(source, key, recipe, dtype, allow_non_finite=options.allow_non_finite)
            _write(writer, key, maker.pieces(), options.packed)
            if maker.non_finite:
                notes.append(f"tensor {key!r} has {maker.non_finite:,} numbers that are not finite")
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
    return sorted(notes)


def _bytes_made(source: Source, recipe: Recipe, dtype: str) -> int:
    numbers = sum(math.prod(source.tensors[name].shape) for name in recipe.sources)
    return numbers * storage_dtype(dtype).itemsize


class _Maker:
    """Makes one tensor of the file from the source's, and counts what is not finite in it."""

    def __init__(
        self, source: Source, key: str, recipe: Recipe, dtype: str, *, allow_non_finite: bool
    ) -> None:
        self._source, self._key, self._recipe, self._dtype = source, key, recipe, dtype
        self._allow = allow_non_finite
        self.non_finite = 0

    def pieces(self) -> Iterator[Array]:
        """Some rows at a time, checked while they are in the processor's cache."""
        for name in self._recipe.sources:
            tensor = self._source.read(name)
            for rows in rows_in_order(tensor.T if self._recipe.transpose else tensor):
                self.non_finite += (found := count_non_finite(rows))
                if found and not self._allow:
                    raise OptionError(
                        "tensor {!r} of {} has numbers that are not finite (NaN or infinity): "
                        "such a model writes nothing sensible; fetch or train it again "
                        "({allow_non_finite=True} converts it all the same)",
                        *(name, self._source.name),
                    )
                yield self._rounded(rows)

    def _rounded(self, rows: Array) -> Array:
        try:
            return round_to(self._dtype, rows)
        except ValueError as error:
            raise OptionError(
                "tensor {!r} has {}; choose {dtype=float32} or bfloat16", self._key, error
            ) from None


def _write(writer: ModelWriter, key: str, pieces: Iterator[Array], packed: str | None) -> None:
    if packed is None:
        writer.write_pieces(key, pieces)
        return
    import torch  # takes seconds to import, and only packing needs it

    writer.write_weight(key, torch.from_numpy(np.concatenate(list(map(np.copy, pieces)))))


@contextlib.contextmanager
def _hashing(source: Source, options: Options) -> Iterator[Callable[[], str | None]]:
    """Hash the source's one file, if it may be a published one, in a thread of its own."""
    kind = "tf" if TENSORFLOW in source.layouts else "bin"
    size = source.files[0].stat().st_size
    if not options.verify or len(source.files) != 1 or not published.may_be(size, kind):
        yield lambda: None
        return
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(published.file_sha256, source.files[0], stop)
        try:
            yield future.result
        finally:
            stop.set()


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
    size = sum(path.stat().st_size for path in source.files)
    if TENSORFLOW in source.layouts and (known := published.by_size(size)):
        raise OptionError(
            "{} has the size of the published {} but another SHA-256, {} instead of {}: the "
            "download is damaged (fetch it again), or this is another training "
            "({verify=False} goes on)",
            *(source.files[0], known.name, sha256, known.data_sha256),
        )
    return {**origin, "sha256": sha256}


def _verified(source: Source, origin: dict[str, Any]) -> str:
    """What of the source was compared with a checksum, and found right."""
    if "published" in origin:
        return "the SHA-256 is the published one"
    if source.checksum:
        return f"the {source.checksum} of every tensor that was read"
    return "nothing: this file format has no checksums"


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
