"""A pickled state dict, such as the community's `pytorch_model.bin`, as a source.

No code in it is executed (`convert.unpickling`), and its tensors are memory-mapped. The zip format
(PyTorch 1.6 and later) has a CRC-32 for each storage, which is verified when a tensor in it is
first read. The older format has no checksums.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert import mapping
from convert.source import Array, Source, Stored, mapped, storage_dtype, widened
from convert.unpickling import Items, Opaque, Refused, Storage, Tensor, describe

_MAX_PICKLE = 8 << 20  # bytes; the published model's takes 0.1 MB
_WINDOW = 16 << 20  # bytes mapped at a time for a checksum
_LOCAL_HEADER = struct.Struct("<4s2xHH4xLLLHH")
_DESCRIPTOR = struct.Struct("<4sL")  # may follow the data; signature and CRC-32, without the sizes
_HAS_DESCRIPTOR, _IS_UTF8 = 1 << 3, 1 << 11
_ZIP64 = 0xFFFFFFFF  # in place of a size that is stored elsewhere
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles of a file before PyTorch 1.6
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")
_MAX_WRAPPERS = 4


@dataclasses.dataclass(frozen=True)
class _Record:
    """The place of a storage's bytes in the file, and their CRC-32 if the file has one."""

    offset: int
    size: int
    crc32: int | None


class PyTorchFile(Source):
    """One pickled state dict, alone or in a dictionary under `state_dict`, `model` or the like.

    Raises `ValueError` for a file that isn't a state dict or that would run code, and `OSError` if
    it can't be read.
    """

    layouts = mapping.PYTORCH

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, _Record] = {}
        self._verified: set[str] = set()
        described = self._describe()
        has_checksums = any(record.crc32 is not None for record in self._records.values())
        self.checksum = "CRC-32" if has_checksums else None
        self._tensors = _state_dict(described, path)
        tensors = {name: self._stored(value) for name, value in self._tensors.items()}
        super().__init__(path.name, [path], tensors)

    def read(self, name: str) -> Array:
        tensor = self._tensors[name]
        assert isinstance(tensor, Tensor)
        self._verify(tensor.storage.key, name)
        dtype = storage_dtype(tensor.dtype)
        first = tensor.storage.start * _size(tensor.storage) + tensor.offset * dtype.itemsize
        offset = self._records[tensor.storage.key].offset + first
        data = mapped(self._path, offset, _extent(tensor) * dtype.itemsize)
        strides = [step * dtype.itemsize for step in tensor.strides]
        array: Array = np.ndarray(tensor.shape, dtype, buffer=data, strides=strides)
        if tensor.dtype == "bfloat16":
            array = widened(array)
        return -array if tensor.negative else array

    def verify_rest(self) -> None:
        for name, value in self._tensors.items():
            if isinstance(value, Tensor):
                self._verify(value.storage.key, name)

    def _stored(self, value: Any) -> Stored:
        """A value as the source declares it, with the reason if it can't be read."""
        if not isinstance(value, Tensor):
            what = value.what if isinstance(value, Opaque) else type(value).__name__
            return Stored(None, (), f"no numbers ({what})")
        try:
            itemsize = storage_dtype(value.dtype).itemsize
        except TypeError:
            return Stored(None, value.shape, f"numbers of type {value.dtype}")
        record = self._records.get(value.storage.key)
        start = value.storage.start * _size(value.storage)
        available = value.storage.count * _size(value.storage)
        if record is None or start + available > record.size:
            return Stored(None, value.shape, "no numbers (its storage is missing or cut off)")
        if (value.offset + _extent(value)) * itemsize > available:
            return Stored(None, value.shape, "no numbers (it reaches beyond its storage)")
        if _overlaps(value):
            what = "numbers that overlap each other in memory (expanded); save it .contiguous()"
            return Stored(None, value.shape, what)
        return Stored(value.dtype, value.shape)

    def _verify(self, key: str, name: str) -> None:
        """Compare a storage with its CRC-32, the first time that it is needed."""
        record = self._records.get(key)
        if record is None or record.crc32 is None or key in self._verified:
            return
        if _crc32(self._path, record) != record.crc32:
            raise ValueError(
                f"tensor {name!r} of {self._path} is damaged: its checksum (CRC-32) is wrong; "
                "fetch the file again"
            )
        self._verified.add(key)

    def _describe(self) -> Any:
        """The pickled object, with a record for each storage that it names."""
        try:
            with self._path.open("rb") as file:
                if file.read(4) == b"PK\x03\x04":
                    return self._describe_zip(file)
                file.seek(0)
                return self._describe_legacy(file)
        except Refused as error:
            raise ValueError(
                f"{self._path} is not a plain state dict, or is hostile: {error}; nothing was run; "
                "write one with torch.save(model.state_dict(), FILE) where the model was made"
            ) from None
        # zipfile raises RuntimeError for encryption and for unknown compression.
        except (ValueError, zipfile.BadZipFile, RuntimeError, struct.error) as error:
            raise ValueError(
                f"{self._path} is damaged or truncated: {error}; fetch it again"
            ) from None

    def _describe_zip(self, file: IO[bytes]) -> Any:
        size = self._path.stat().st_size
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        inflated = sum(member.file_size for member in members)
        if inflated > size:  # PyTorch compresses nothing
            raise ValueError(f"it would inflate to {inflated:,} bytes")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} files data.pkl, not one")
        folder = pickles[0].filename.removesuffix("data.pkl")
        has_checksums = any(member.CRC for member in members)  # PyTorch can leave them out
        small: dict[str, _Record] = {}
        for member in members:
            name = member.filename.removeprefix(folder)
            offset = _data_offset(file, member, size)
            record = _Record(offset, member.file_size, member.CRC if has_checksums else None)
            if name.startswith("data/"):
                self._records[name.removeprefix("data/")] = record
            else:
                small[name] = record
        for name in small:
            self._content(name, small)
        if "byteorder" in small and self._content("byteorder", small) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return describe(io.BytesIO(self._content("data.pkl", small)))

    def _content(self, name: str, records: dict[str, _Record]) -> bytes:
        """The bytes of a small record, verified."""
        record = records[name]
        if record.size > _MAX_PICKLE:
            raise ValueError(f"its {name} has {record.size:,} bytes, more than any state dict's")
        if record.crc32 not in (None, _crc32(self._path, record)):
            raise ValueError(f"the checksum (CRC-32) of its {name} is wrong")
        return bytes(mapped(self._path, record.offset, record.size))

    def _describe_legacy(self, file: IO[bytes]) -> Any:
        """The pickled object of the format before PyTorch 1.6.

        The file holds five pickles: a magic number, a version, the machine, the object and the
        order of the storages. The storages follow, each after its number of elements.
        """
        size = self._path.stat().st_size
        head = io.BytesIO(file.read(_MAX_PICKLE))
        for number in _LEGACY:
            if describe(head) != number:
                raise Refused("it is a pickle that PyTorch did not write")
        machine = describe(head)
        if isinstance(machine, Items) and ("little_endian", False) in machine.pairs:
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}
        described, keys = describe(head, storages), describe(head)
        offset = head.tell()
        for key in keys if isinstance(keys, list) else []:
            file.seek(offset)
            (count,) = struct.unpack("<q", file.read(8))
            length = count * _size(storages[str(key)]) if str(key) in storages else -1
            if not 0 <= length <= size - offset - 8:
                raise ValueError(f"found {size:,} bytes, too few for its storages")
            self._records[str(key)] = _Record(offset + 8, length, None)
            offset += 8 + length
        return described


def _data_offset(file: IO[bytes], member: zipfile.ZipInfo, size: int) -> int:
    """The offset of a member's data, by its local header, which must agree with the directory."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {member.filename[:80]} is compressed; PyTorch compresses nothing")
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    magic, flags, method, crc, compressed, plain, name, extra = _LOCAL_HEADER.unpack(header)
    offset = int(member.header_offset + _LOCAL_HEADER.size + name + extra)
    if magic != b"PK\x03\x04" or offset + member.file_size > size:
        raise ValueError(f"its {member.filename[:80]} is not where the archive says")
    title = file.read(name).decode("utf-8" if flags & _IS_UTF8 else "cp437", errors="replace")
    padding = file.read(extra)
    file.seek(offset + member.file_size)
    behind = file.read(_DESCRIPTOR.size).ljust(_DESCRIPTOR.size)
    if flags & _HAS_DESCRIPTOR and behind.startswith(b"PK\x07\x08"):
        crc = _DESCRIPTOR.unpack(behind)[1]
    sizes = {compressed, plain} - {_ZIP64, 0 if flags & _HAS_DESCRIPTOR else _ZIP64}
    agrees = (
        (title, method) == (member.orig_filename, member.compress_type)
        and sizes <= {member.file_size}
        and crc in (member.CRC, 0)
        and _is_padding(padding)
    )
    if not agrees:
        raise ValueError(f"its {member.filename[:80]} is described in two ways")
    return offset


def _is_padding(extra: bytes) -> bool:
    """Whether an extra field, if it is PyTorch's padding, is as PyTorch writes it."""
    return not extra.startswith(b"FB") or not extra[4:].strip(b"Z")


def _crc32(path: Path, record: _Record) -> int:
    """The CRC-32 of a record's bytes."""
    crc = 0
    for start in range(0, record.size, _WINDOW):
        size = min(_WINDOW, record.size - start)
        crc = zlib.crc32(mapped(path, record.offset + start, size), crc)
    return crc


def _size(storage: Storage) -> int:
    """The bytes of one element of a storage."""
    try:
        return storage_dtype(storage.dtype).itemsize
    except TypeError:
        return {"quint8": 1, "qint8": 1, "qint32": 4}.get(storage.dtype, 1)


def _extent(tensor: Tensor) -> int:
    """The number of elements from a tensor's first to its last in memory, both included."""
    if 0 in tensor.shape:
        return 0
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return 1 + sum((size - 1) * step for size, step in steps)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share their place in memory."""
    reach = 0
    for step, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return 0 not in tensor.shape
        reach += (size - 1) * step
    return False


def _state_dict(described: Any, path: Path) -> dict[str, Any]:
    """The names and tensors in a pickled object.

    Raises `ValueError` if it is no state dict or a name occurs twice.
    """
    for _ in range(_MAX_WRAPPERS):
        inner = _unwrapped(described, path)
        if inner is None:
            break
        described = inner
    if not isinstance(described, Items) or not all(
        isinstance(name, str) for name, _ in described.pairs
    ):
        what = "dict" if isinstance(described, Items) else type(described).__name__
        raise ValueError(
            f"{path} holds {what}; expected a state dict, as torch.save(model.state_dict(), FILE) "
            "writes it"
        )
    result: dict[str, Any] = {}
    for name, value in described.pairs:
        if name in result:
            raise ValueError(f"{path} has {name[:80]!r} twice; keep one set of weights")
        result[name] = value
    return result


def _unwrapped(described: Any, path: Path) -> Items | None:
    """The state dict inside a dictionary that is not one itself, or None.

    It is found by the names that programs give it, or as the only inner one that holds tensors.
    """
    if not isinstance(described, Items):
        return None
    inside = {
        name: value
        for name, value in described.pairs
        if isinstance(name, str) and isinstance(value, Items)
    }
    named = next((inside[name] for name in _WRAPPERS if name in inside), None)
    if named is not None or any(isinstance(value, Tensor) for _, value in described.pairs):
        return named
    full = [name for name, value in inside.items() if _holds_tensors(value)]
    if len(full) > 1:
        names = " and ".join(repr(name[:40]) for name in full[:3])
        raise ValueError(f"{path} holds several state dicts, {names}; save the model's alone")
    return inside[full[0]] if full else None


def _holds_tensors(described: Items) -> bool:
    """Whether a dictionary, or one nested in it, holds tensors under names."""
    queue, seen = [described], set[int]()
    while queue:
        items = queue.pop()
        seen.add(id(items))  # one object may be referred to many times
        for name, value in items.pairs:
            if isinstance(name, str) and isinstance(value, Tensor):
                return True
            if isinstance(name, str) and isinstance(value, Items) and id(value) not in seen:
                queue.append(value)
    return False
