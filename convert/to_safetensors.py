"""From a checkpoint to the one file: plan, write the tensors, and say where they come from."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from convert import published
from convert.inputs import Location
from convert.mapping import TENSORFLOW
from convert.plan import Options, Plan, make_plan
from convert.source import Array, Joined, Source
from convert.tensors import Progress, make_tensors, orders, whole
from convert.vocabulary import Vocabulary
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.disk import resolve_target
from gpt2ml_torch.modelfile.writer import ModelWriter
from gpt2ml_torch.options import OptionError


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
        with _writer(out, plan, options) as writer:
            non_finite = make_tensors(
                source,
                orders(plan, options.unpacked_dtype),
                functools.partial(_write, writer, options),
                allow_non_finite=options.allow_non_finite,
                progress=progress,
            )
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


def _writer(out: Path, plan: Plan, options: Options) -> ModelWriter:
    return ModelWriter(
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


def _write(writer: ModelWriter, options: Options, name: str, pieces: Iterator[Array]) -> None:
    if options.packed is None:
        writer.write_pieces(name, pieces)
    else:
        writer.write_weight(name, whole(pieces, options.unpacked_dtype))


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
