"""ModelFile: one file with weights, configuration, vocabulary and source, which belong together.

A safetensors file whose metadata holds, beside the customary `format`:

    gpt2ml_format    version of this layout
    config           JSON, the fields of `GPT2MLConfig`
    vocab            the vocabulary file's exact text, if there is one
    source           JSON: where the weights come from (name, step, sha256, ...)
    generation       JSON: defaults for generation, if any
    quantization     "int8" or "int4" where the large matrices are packed (`modelfile.format`)
    crc32c           JSON: the CRC-32C of each tensor, 8 hexadecimal digits
    metadata_crc32c  the CRC-32C of all the other metadata

Files may come from strangers, so every size is checked against the file's real length before
anything is allocated. The file stays open, so that everything that a `ModelFile` returns comes from
the same file, even if another takes its name meanwhile. (The safetensors library's `safe_open`
takes only a name, and parses the header again.) PyTorch is imported when the first tensor is read.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2ml_torch import foreign
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.checksum import crc32c, metadata_checksum
from gpt2ml_torch.modelfile.format import (
    CHECKSUMS,
    METADATA_CHECKSUM,
    SCALE,
    SLOT,
    check_vocab,
    expected_slots,
    expected_tensors,
    packed_precision,
)
from gpt2ml_torch.modelfile.header import (
    CURE,
    TensorInfo,
    check_entries,
    header_length,
    parse_header,
)
from gpt2ml_torch.modelfile.metadata import (
    check_custom,
    check_specs,
    common_dtype,
    parse_checksums,
    parse_object,
    parse_packed,
)
from gpt2ml_torch.precision import Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gpt2ml_torch.tokenizer import Tokenizer

PIECE_BYTES = 4 << 20  # of a tensor that is converted or moved; a piece stays in the cache

_ROWS_MULTIPLE = 16  # packed together
# Opening a pipe must not wait for a writer, and Windows must not translate line ends.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class ModelFile:
    """A model file, opened and checked once: `with ModelFile.open(path) as file: ...`.

    `config`, `vocab` (None without one), `source` and `generation` are the metadata. `dtype` is the
    precision of every unpacked tensor, `packed` of the large matrices if they are packed, and
    `precision` of the large matrices in any case. `tensors` and `slots` describe the weights and
    the optimizer's statistics. `checksums` holds the CRC-32C of each by its name in the file; files
    of version 0.1.0 have none. Tensors may be read from several threads.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Take over the open file `fd`; `open` is the public way."""
        self.path = path
        self._fd = fd
        self._reading = threading.Lock()
        self._closing = weakref.finalize(self, os.close, fd)
        try:
            status = _check_regular(fd, path)
            self.size = status.st_size
            self._changed = status.st_mtime_ns
            length = header_length(self._bytes(0, min(8, self.size)), self.size)
            header = parse_header(self._bytes(8, length))
            self._metadata = check_custom(header.pop("__metadata__", None), header)
            self._describe(check_entries(header, 8 + length, self.size))
        except ValueError as error:
            self.close()
            raise ValueError(foreign.in_place_of_model(path) or f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Open a file and check everything except the weights themselves.

        Raises `OSError` if the file can't be read, and `ValueError` if it is damaged, hostile, not
        a model file, or of a later version.
        """
        try:
            fd = os.open(path, os.O_RDONLY | _NO_WAIT)
        except OSError as error:
            why = foreign.in_place_of_model(Path(path))
            raise type(error)(
                error.errno, why or f"can't read the model file {path}: {error.strerror}"
            ) from None
        return cls(Path(path), fd)

    def _describe(self, entries: Mapping[str, TensorInfo]) -> None:
        custom = self._metadata
        self.config = GPT2MLConfig.from_dict(parse_object(custom["config"], "config"))
        self.vocab = custom.get("vocab")
        check_vocab(self.vocab, self.config)
        self.source = parse_object(custom.get("source", "{}"), "source")
        self.generation = parse_object(custom.get("generation", "{}"), "generation")
        self.packed = parse_packed(custom.get("quantization"))
        slots = {name: info for name, info in entries.items() if name.startswith(SLOT)}
        self.tensors = {name: info for name, info in entries.items() if name not in slots}
        self.dtype = common_dtype(self.tensors, self.config, self.packed)
        expected = expected_tensors(self.config, self.dtype, self.packed)
        check_specs(self.tensors, expected, "the file")
        if slots:
            check_specs(slots, expected_slots(self.config), "the optimizer in the file")
        self.slots = {name.removeprefix(SLOT): info for name, info in slots.items()}
        self._entries = entries
        self.checksums = parse_checksums(custom.get(CHECKSUMS), entries)

    @property
    def precision(self) -> Precision:
        """The precision in which the large matrices are stored."""
        return self.packed or self.dtype

    def close(self) -> None:
        """Close the file; tensors that are memory-mapped stay valid."""
        self._closing()

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the file's vocabulary; raises `ValueError` for a file without one."""
        from gpt2ml_torch.tokenizer import Tokenizer  # late, since it is built on this module

        if self.vocab is None:
            raise ValueError(f"{self.path} holds no vocabulary: convert it again with one")
        try:
            return Tokenizer(self.vocab, num_embeddings=self.config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    # -- tensors ----------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own, compared with its checksum if the file has one.

        `name` is the name in the file; the names of statistics begin with `optimizer.`. Raises
        `ValueError` if the tensor is damaged.
        """
        import torch

        info = self._entries[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        data = tensor.view(-1).view(torch.uint8).numpy().data
        self._read(data, info.start)
        self._compare(name, crc32c(data))
        return tensor

    def read_bytes(self, name: str, start: int, size: int) -> bytearray:
        """Some of a tensor's bytes as stored, without comparing a checksum."""
        data = bytearray(size)
        self.read_into(memoryview(data), name, start)
        return data

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill a buffer with a tensor's bytes from byte `start` on, as `read_bytes` gives them."""
        self._read(view, self._entries[name].start + start)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's statistics by the names in `slot_shapes`, if the file keeps them, or {}.

        Memory-mapped, as by `state_dict`.
        """
        mapping = self._map() if self.slots else None
        return {name: _mapped(mapping, info) for name, info in self.slots.items()}

    def state_dict(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The weights on a device and in a dtype (the file's, if None); packed ones keep theirs.

        On the CPU in the file's dtype they are memory-mapped, private to this process: nothing is
        read before it is used, and changing them does not change the file. Otherwise, and if they
        are packed, they are read piece by piece, so that there are never two whole copies.
        """
        import torch

        device = torch.device(device)
        if device.type == "cpu" and dtype in (None, self.dtype.dtype) and self.packed is None:
            mapping = self._map()
            return {name: _mapped(mapping, info) for name, info in self.tensors.items()}
        tensors: dict[str, Tensor] = {}
        for name, first, rows in self.rows():
            if name not in tensors:
                plain = packed_precision(name.removesuffix(SCALE), self.packed) is None
                wanted = dtype if dtype is not None and plain else rows.dtype
                tensors[name] = _empty(self.tensors[name].shape, wanted, device)
            tensors[name][first : first + len(rows)].copy_(rows)
            if name.endswith(SCALE) and not rows.isfinite().all():
                raise ValueError(f"{self.path}: tensor {name!r} has NaN or infinity; {CURE}")
        return tensors

    def rows(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the weights in pieces: name, index of the first row, and the rows.

        The rows are valid until the next piece. Their number is a multiple of 16 except in a
        tensor's last piece. They are read into a buffer, since mapped pages would stay in memory.
        """
        import torch

        buffer = bytearray(PIECE_BYTES)
        for name, info in self.tensors.items():
            row_bytes = info.size // info.shape[0]
            count = max(PIECE_BYTES // row_bytes // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE
            if count * row_bytes > len(buffer):
                buffer = bytearray(count * row_bytes)
            for first in range(0, info.shape[0], count):
                shape = (min(count, info.shape[0] - first), *info.shape[1:])
                view = memoryview(buffer)[: shape[0] * row_bytes]
                self._read(view, info.start + first * row_bytes)
                dtype = getattr(torch, info.dtype)
                rows = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape))
                yield name, first, rows.view(shape)

    # -- checksums --------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare metadata and tensors with their checksums; `progress` gets bytes done and in all.

        Raises `ValueError`, naming the tensor, if one differs, and if the file has no checksums.
        """
        if not self.checksums:
            raise ValueError(
                f"{self.path} holds no checksums: it was written by version 0.1.0; {CURE}"
            )
        if self._metadata.get(METADATA_CHECKSUM) != metadata_checksum(self._metadata):
            raise ValueError(f"{self.path}: the metadata are damaged or were edited; {CURE}")
        total = sum(info.size for info in self._entries.values())
        for name, info in self._entries.items():
            self.verify_tensor(name)
            if progress is not None:
                progress(info.size, total)

    def verify_tensor(self, name: str) -> None:
        """Compare one tensor with its checksum, if the file has one; raises `ValueError`."""
        info = self._entries[name]
        if name not in self.checksums:
            return
        buffer = memoryview(bytearray(min(PIECE_BYTES, info.size)))
        checksum = 0
        for start in range(info.start, info.end, PIECE_BYTES):
            view = buffer[: min(PIECE_BYTES, info.end - start)]
            self._read(view, start)
            checksum = crc32c(view, checksum)
        self._compare(name, checksum)

    def _compare(self, name: str, found: int) -> None:
        expected = self.checksums.get(name, found)
        if found != expected:
            raise ValueError(
                f"{self.path}: tensor {name!r} is damaged: its checksum is {found:08x}, the file "
                f"says {expected:08x}; copy the file again, or {CURE}"
            )

    # -- bytes ------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise `ValueError` if the file was written to since it was opened."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._changed):
            raise ValueError(f"{self.path} was changed while it was read; load it again")

    def _bytes(self, start: int, size: int) -> bytes:
        data = bytearray(size)
        self._read(memoryview(data), start)
        return bytes(data)

    def _read(self, view: memoryview, start: int) -> None:
        if not self._closing.alive:
            raise ValueError(f"{self.path} was closed; open it again")
        while view:
            if hasattr(os, "preadv"):
                count = os.preadv(self._fd, [view], start)
            else:  # Windows
                with self._reading:
                    os.lseek(self._fd, start, os.SEEK_SET)
                    data = os.read(self._fd, len(view))
                count = len(data)
                view[:count] = data
            if not count:
                raise ValueError(f"{self.path} became shorter while it was read; load it again")
            view, start = view[count:], start + count

    def _map(self) -> mmap.mmap:
        if not self._closing.alive:
            raise ValueError(f"{self.path} was closed; open it again")
        self.check_unchanged()
        return mmap.mmap(self._fd, self.size, access=mmap.ACCESS_COPY)


def _mapped(mapping: Any, info: TensorInfo) -> Tensor:
    import torch

    dtype = getattr(torch, info.dtype)
    count = math.prod(info.shape)
    tensor = torch.frombuffer(mapping, dtype=dtype, count=count, offset=info.start)
    return tensor.view(info.shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    from gpt2ml_torch.kernels import packing  # brings PyTorch

    if device.type != "cpu" or dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device=device)
    return packing.empty_in_huge_pages(shape, dtype)


def _check_regular(fd: int, path: Path) -> os.stat_result:
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(
            errno.EISDIR,
            f"{path} is a folder; expected a .safetensors file (`python -m convert` makes one)",
        )
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return status
