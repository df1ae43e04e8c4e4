"""Writing a TensorFlow V2 checkpoint, one tensor in memory at a time.

TensorFlow's own op, SaveV2, wants all tensors at once, which for the published size is 5.5 GB. The
format is simple: the data file holds the tensors end to end, the index is a sorted string table of
protocol buffers (tensorflow/core/util/ tensor_bundle/tensor_bundle.h,
tensorflow/core/lib/io/table_format.txt). The checksums are TensorFlow's, taken from its record
writer.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from convert.tf_source import import_tensorflow

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_RECORD_FOOTER = 4  # the data's checksum


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variable: its dtype, its shape, and a function that makes its bytes when wanted."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], bytearray]

    @classmethod
    def of(cls, value: Any) -> Entry:
        """An entry of a tensor or array at hand."""
        tensor = torch.as_tensor(value)
        return cls(tensor.dtype, tuple(tensor.shape), lambda: _bytes_of(tensor))


def write_tf_checkpoint(
    prefix: Path,
    tensors: Mapping[str, Any],
    *,
    meta_graph: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `PREFIX.index` and `PREFIX.data-00000-of-00001`, and `PREFIX.meta` if asked for.

    The values are tensors, arrays, or `Entry` for what should not be in memory all at once. What is
    written is read back by TensorFlow and compared. Not atomic: write into a folder of its own and
    rename. Raises `OSError`.
    """
    tf = import_tensorflow()
    entries = {
        name: value if isinstance(value, Entry) else Entry.of(value)
        for name, value in sorted(tensors.items())
    }
    data_path = prefix.with_name(prefix.name + ".data-00000-of-00001")
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=prefix.parent) as scratch:
            checksums = _Checksums(tf, Path(scratch) / "record")
            with data_path.open("wb") as data:
                table = _write_data(tf, entries, data, checksums, progress)
                data.flush()
                os.fsync(data.fileno())
            index = _table(table, checksums)
        prefix.with_name(prefix.name + ".index").write_bytes(index)
        if meta_graph:
            _write_meta_graph(tf, prefix.with_name(prefix.name + ".meta"), entries)
    except tf.errors.OpError as error:
        raise OSError(f"can't write {prefix}: {' '.join(str(error.message).split())}") from None
    _read_back(tf, prefix, entries)


class _Checksums:
    """TensorFlow's masked CRC-32C, by way of its record files, which hold it behind the data."""

    def __init__(self, tf: Any, scratch: Path) -> None:
        self._tf = tf
        self._scratch = scratch

    def of(self, data: bytes | bytearray) -> int:
        with self._tf.io.TFRecordWriter(str(self._scratch)) as writer:
            writer.write(data)
        with self._scratch.open("rb") as record:
            record.seek(-_RECORD_FOOTER, os.SEEK_END)
            (checksum,) = struct.unpack("<I", record.read(_RECORD_FOOTER))
        return int(checksum)


def _write_data(
    tf: Any,
    entries: Mapping[str, Entry],
    data: BinaryIO,
    checksums: _Checksums,
    progress: Callable[[int], None] | None,
) -> list[tuple[bytes, bytes]]:
    """Write the tensors end to end; returns the index's keys and values, in order."""
    from tensorflow.core.protobuf import tensor_bundle_pb2

    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=1)
    header.version.producer = 1
    table = [(b"", header.SerializeToString())]
    offset = 0
    for name, entry in entries.items():
        content = entry.load()
        data.write(content)
        proto = tensor_bundle_pb2.BundleEntryProto(
            dtype=_tf_dtype(tf, entry.dtype).as_datatype_enum,
            offset=offset,
            size=len(content),
            crc32c=checksums.of(content),
        )
        for size in entry.shape:
            proto.shape.dim.add(size=size)
        table.append((name.encode(), proto.SerializeToString()))
        offset += len(content)
        if progress:
            progress(len(content))
    return table


def _bytes_of(tensor: Tensor) -> bytearray:
    return bytearray(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tf_dtype(tf: Any, dtype: torch.dtype) -> Any:
    return getattr(tf, str(dtype).removeprefix("torch."))


def _table(pairs: list[tuple[bytes, bytes]], checksums: _Checksums) -> bytes:
    """A sorted string table with one uncompressed data block."""
    content = bytearray()

    def append(block: bytes) -> bytes:
        """Append a block with its trailer; returns the handle that points to it."""
        handle = _varint(len(content)) + _varint(len(block))
        block += b"\0"  # not compressed
        content.extend(block + struct.pack("<I", checksums.of(block)))
        return handle

    data = append(_block(pairs))
    meta = append(_block([]))
    index = append(_block([(pairs[-1][0], data)]))
    footer = (meta + index).ljust(_FOOTER_BYTES - 8, b"\0")
    return bytes(content) + footer + struct.pack("<Q", _MAGIC)


def _block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Key-value pairs, each a restart point, so that no key is abbreviated."""
    content, restarts = b"", []
    for key, value in pairs:
        restarts.append(len(content))
        content += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    return content + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_meta_graph(tf: Any, path: Path, entries: Mapping[str, Entry]) -> None:
    """A graph of the variables and their saver, for tools that start from `.meta`."""
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        variables = [
            v1.get_variable(
                name,
                shape=entry.shape,
                dtype=_tf_dtype(tf, entry.dtype),
                initializer=v1.zeros_initializer(),
                use_resource=False,
            )
            for name, entry in entries.items()
        ]
        v1.train.Saver(variables).export_meta_graph(str(path))


def _read_back(tf: Any, prefix: Path, entries: Mapping[str, Entry]) -> None:
    """TensorFlow compares each tensor with the checksum of what was to be written."""
    for name, entry in entries.items():
        try:
            (value,) = tf.raw_ops.RestoreV2(
                prefix=str(prefix),
                tensor_names=[name],
                shape_and_slices=[""],
                dtypes=[_tf_dtype(tf, entry.dtype)],
            )
        except tf.errors.OpError as error:
            raise OSError(f"{prefix} reads back damaged: {name!r}: {error.message}") from None
        if tuple(value.shape) != entry.shape:
            raise OSError(f"{prefix}: {name!r} reads back with another shape")
