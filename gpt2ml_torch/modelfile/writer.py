"""Write a model file tensor by tensor, each with its checksum; rename it when complete.

The safetensors library serialises a whole state dict at once, which for a model that just fits in
memory is one copy too many. Here the header is written first, each tensor is written to its place
when it is ready, and the finished file is renamed: a process killed at any moment leaves the old
file untouched. PyTorch is imported only if a `torch.Tensor` is written: the converter writes bytes,
and has finished before PyTorch would have been imported.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gpt2ml_torch import disk
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.checksum import crc32c, metadata_checksum
from gpt2ml_torch.modelfile.format import (
    CHECKSUMS,
    DTYPES,
    FORMAT_VERSION,
    METADATA_CHECKSUM,
    SCALE,
    TensorSpec,
    byte_size,
    check_names,
    check_vocab,
    dtype_name,
    expected_slots,
    expected_tensors,
    packed_precision,
    plain_weights,
)
from gpt2ml_torch.modelfile.header import build_header
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.precision import FLOATING, INTEGER, Precision
from gpt2ml_torch.valid_json import to_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESERVE = 2 << 10  # bytes of the header kept free for `ModelWriter.set_source`

_NOT_FINITE = (
    "tensor {!r} has NaN or infinity, so the model would write nonsense; take an undamaged source, "
    "or give {allow_non_finite} to write it anyway"
)

_Writer = TypeVar("_Writer", bound="SafetensorsWriter")  # typing.Self, before Python 3.11


class SafetensorsWriter:
    """Writes the declared tensors, in any order and from any number of threads.

    A context manager. The file is built as `NAME.partial` beside its place. Leaving the `with`
    block normally checks that every tensor was written and renames it; leaving it by an exception
    removes it. The next writer overwrites what a killed process left. Two processes must not write
    the same file at once; the second raises an error. `checksums` holds each written tensor's
    CRC-32C. `reserve` is the space in the header, in bytes, that is kept for `replace_metadata`.

    Raises `OSError` if the file can't be written (`FileExistsError` if it exists and `overwrite` is
    false), and `ValueError` for a tensor that was declared differently, and for NaN and infinity
    unless `allow_non_finite`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        overwrite: bool = False,
        reserve: int = 0,
        allow_non_finite: bool = False,
    ) -> None:
        self.path = disk.resolve_target(path, overwrite=overwrite)
        self.checksums: dict[str, int] = {}
        self._overwrite = overwrite
        self._allow_non_finite = allow_non_finite
        self._specs = dict(specs)
        header, starts, size = build_header(self._specs, metadata, reserve=reserve)
        self._header_size = len(header)
        self._offsets = {name: len(header) + start for name, start in starts.items()}
        self.size = len(header) + size
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._fd = -1
        self._owns_partial = False
        self._lock = disk.lock(
            self._partial.with_name(self._partial.name + ".lock"),
            f"another process is writing {self.path}; wait for it to end",
        )
        try:
            self._fd = disk.open_new(self._partial)
            self._owns_partial = True
            disk.check_room(self.path, self.size)
            disk.allocate(self._fd, self.size)
            with self._open() as file:
                self._write(file, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def write_pieces(self, name: str, pieces: Iterable[Any]) -> None:
        """Write one declared tensor from pieces, which are contiguous objects with a buffer."""
        if name not in self._specs or name in self.checksums:
            state = "was written already" if name in self._specs else "was not declared"
            raise ValueError(f"tensor {name!r} {state}")
        dtype = self._specs[name][0]
        start = at = self._offsets[name]
        end = start + byte_size(self._specs[name])
        checksum = 0
        with self._open() as file:
            file.seek(start)
            for piece in pieces:
                data = memoryview(piece).cast("B")
                if at + len(data) > end:
                    raise ValueError(f"tensor {name!r} takes {end - start} bytes; more were given")
                for chunk in disk.chunks(data):
                    if not self._allow_non_finite and not _is_finite(chunk, dtype):
                        raise OptionError(_NOT_FINITE, name)
                    checksum = crc32c(chunk, checksum)
                    self._write(file, chunk)
                at += len(data)
        if at != end:
            raise ValueError(f"tensor {name!r} takes {end - start} bytes; {at - start} were given")
        disk.start_writeback(self._fd, start, end - start)
        self.checksums[name] = checksum

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata; they may be at most `reserve` bytes longer than before."""
        header, _, _ = build_header(self._specs, metadata)
        spare = self._header_size - len(header)
        if spare < 0:
            raise ValueError(f"the metadata take {-spare} bytes more than was reserved for them")
        text = header[8:] + b" " * spare
        with self._open() as file:
            self._write(file, memoryview(struct.pack("<Q", len(text)) + text))

    def commit(self) -> None:
        """Sync the complete file to the disk and rename it."""
        if missing := sorted(set(self._specs) - set(self.checksums)):
            raise ValueError(f"tensors never written: {', '.join(missing)}")
        self._guard(os.fsync, self._fd)
        disk.resolve_target(self.path, overwrite=self._overwrite)  # one may have appeared meanwhile
        self._close()  # Windows can't rename open files
        self._guard(os.replace, self._partial, self.path)
        disk.sync_directory(self.path.parent)
        disk.unlock(self._lock)

    def abort(self) -> None:
        """Remove what was written so far; does nothing after `commit`."""
        if self._lock.is_locked:
            self._close()
            if self._owns_partial:  # a file that was in the way stays
                self._partial.unlink(missing_ok=True)
            disk.unlock(self._lock)

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self.commit()
        finally:
            self.abort()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> FileIO:
        """The unfinished file, opened again so that each thread has its own position."""
        file: FileIO = self._guard(open, self._partial, "r+b", buffering=0)
        return file

    def _write(self, file: FileIO, data: memoryview) -> None:
        while data:
            data = data[self._guard(file.write, data) :]

    def _guard(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of the operating system; its errors name the file and its size."""
        try:
            return function(*arguments, **options)
        except OSError as error:
            raise OSError(
                error.errno, f"writing {self.path} ({self.size:,} bytes) failed: {error.strerror}"
            ) from error


def _is_finite(data: memoryview, dtype: str) -> bool:
    """Whether the elements of a dtype in these bytes are neither NaN nor infinite."""
    if dtype == "bfloat16":  # NumPy lacks it
        return bool((np.frombuffer(data, "<u2") & 0x7FFF).max(initial=0) < 0x7F80)
    if dtype in FLOATING:
        return bool(np.isfinite(np.frombuffer(data, f"<f{DTYPES[dtype][1]}")).all())
    return True


class ModelWriter(SafetensorsWriter):
    """Writes a model file tensor by tensor.

        with ModelWriter(path, config, dtype=torch.float32) as writer:
            writer.write_weight(name, tensor)

    Every weight of `expected_shapes(config)` must be written, in `dtype`. With `packed`, "int8" or
    "int4", the large ones are packed when they are written; with `slots`, the optimizer's
    statistics (`slot_shapes`) must be written too. Raises as `SafetensorsWriter` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: GPT2MLConfig,
        *,
        dtype: torch.dtype | str,
        vocab: str | None = None,
        source: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        packed: Precision | str | None = None,
        slots: bool = False,
        overwrite: bool = False,
        allow_non_finite: bool = False,
    ) -> None:
        if packed not in (None, *INTEGER):
            raise ValueError(f"packed is {str(packed)!r}; expected one of {', '.join(INTEGER)}")
        if dtype_name(dtype) not in FLOATING:
            raise ValueError(
                f"weights of {dtype_name(dtype)}; expected one of {', '.join(FLOATING)}"
            )
        check_vocab(vocab, config)
        self._packed = None if packed is None else Precision(packed)
        specs = expected_tensors(config, dtype_name(dtype), self._packed)
        if slots:
            specs.update(expected_slots(config))
        self._custom = _metadata(config, vocab, source, generation, self._packed)
        # Placeholders of the checksums' final length, so that the header has space for them.
        unknown = _with_checksums(self._custom, dict.fromkeys(specs, 0))
        super().__init__(
            path,
            specs,
            unknown,
            overwrite=overwrite,
            reserve=_RESERVE,
            allow_non_finite=allow_non_finite,
        )

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor; from any device, contiguous or not."""
        import torch

        spec = self._specs.get(name)
        found = dtype_name(tensor.dtype), tuple(tensor.shape)
        if spec is not None and found != (spec[0], tuple(spec[1])):
            raise ValueError(
                f"tensor {name!r} is {found[0]} of shape {found[1]}; "
                f"expected {spec[0]} of shape {tuple(spec[1])}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_pieces(name, [flat.numpy()])

    def write_weight(self, name: str, tensor: Tensor) -> None:
        """Write one weight, given in floating point; it is packed if the file packs this weight."""
        precision = packed_precision(name, self._packed)
        if precision is None:
            return self.write(name, tensor)
        from gpt2ml_torch import kernels  # brings PyTorch, a second to import

        try:
            weight, scale = kernels.pack(tensor.detach().cpu(), precision)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
        assert scale is not None
        self.write(name, weight)
        self.write(name + SCALE, scale)

    def set_source(self, source: Mapping[str, Any]) -> None:
        """Set the source of the weights late, since hashing it takes as long as reading it."""
        self._custom["source"] = to_json(source, sort_keys=True)

    def commit(self) -> None:
        if len(self.checksums) == len(self._specs):
            self.replace_metadata(_with_checksums(self._custom, self.checksums))
        super().commit()


def _with_checksums(custom: Mapping[str, str], checksums: Mapping[str, int]) -> dict[str, str]:
    """The metadata with the checksums of the tensors, and its own."""
    values = {name: f"{value:08x}" for name, value in checksums.items()}
    metadata = {**custom, CHECKSUMS: to_json(values, sort_keys=True)}
    return {**metadata, METADATA_CHECKSUM: metadata_checksum(metadata)}


def _metadata(
    config: GPT2MLConfig,
    vocab: str | None,
    source: Mapping[str, Any] | None,
    generation: Mapping[str, Any] | None,
    packed: Precision | None,
) -> dict[str, str]:
    """The metadata of a file, without checksums."""
    result = {
        "format": "pt",
        "gpt2ml_format": str(FORMAT_VERSION),
        "config": to_json(config.to_dict(), sort_keys=True),
        "source": to_json(source or {}, sort_keys=True),
    }
    if generation:
        result["generation"] = to_json(generation, sort_keys=True)
    if vocab is not None:
        result["vocab"] = vocab
    if packed is not None:
        result["quantization"] = packed.value
    return result


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: GPT2MLConfig,
    *,
    vocab: str | None = None,
    source: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    packed: Precision | str | None = None,
    overwrite: bool = True,
    allow_non_finite: bool = False,
) -> None:
    """Write a state dict; the file replaces an older one only when it is complete.

    `packed` is the precision of large matrices that are packed already. Raises `ValueError` for
    tensors that don't belong to the configuration, have several dtypes, or are not finite (unless
    `allow_non_finite`), and `OSError`.
    """
    packed = None if packed is None else Precision(packed)
    expected = expected_tensors(config, "float32", packed)
    check_names(tensors, expected, "the state dict")
    dtypes = {tensors[name].dtype for name in plain_weights(config, packed)}
    if len(dtypes) > 1:
        raise ValueError(
            f"weights of several dtypes, {', '.join(sorted(map(dtype_name, dtypes)))}; convert the "
            "model to one first"
        )
    with ModelWriter(
        path,
        config,
        dtype=dtypes.pop(),
        vocab=vocab,
        source=source,
        generation=generation,
        packed=packed,
        overwrite=overwrite,
        allow_non_finite=allow_non_finite,
    ) as writer:
        for name in expected:
            writer.write(name, tensors[name])
