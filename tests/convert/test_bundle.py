"""TensorFlow's checkpoint format, held against TensorFlow itself: it writes and we read, and the
other way round. And index files made to do harm."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convert import bundle
from convert.bundle import Cursor, bytes_field, fields, fixed32_field, number_field, varint
from convert.source import Stored
from convert.tensorflow import TensorFlowCheckpoint, Variable, write_checkpoint
from tests.helpers.checkpoint_factory import write_tf

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
crc32c = pytest.importorskip("crc32c", reason="crc32c is not installed").crc32c

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")


def numbers(dtype: str, *shape: int) -> NDArray[Any]:
    values = np.random.default_rng(len(shape)).standard_normal(shape) * 100
    return values.astype(dtype)


def some_tensors() -> dict[str, Any]:
    """Every dtype, no dimension to four, empty ones, and names that share beginnings."""
    tensors: dict[str, Any] = {f"scope/{dtype}": numbers(dtype, 3, 5) for dtype in DTYPES}
    for dimensions in range(5):
        tensors[f"scope/of/{dimensions}"] = numbers("float32", *range(2, 2 + dimensions))
    return {**tensors, "empty": numbers("float32", 0, 7), "名字": numbers("float32", 2)}


def source(prefix: Path) -> TensorFlowCheckpoint:
    return TensorFlowCheckpoint(prefix)


def assert_holds(prefix: Path, tensors: Mapping[str, Any]) -> None:
    found = source(prefix)
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        value = np.asarray(value)
        assert found.tensors[name] == Stored(value.dtype.name, value.shape)
        read = found.read(name)
        assert read.dtype == value.dtype
        assert np.array_equal(read, value)


def test_what_tensorflow_writes_is_read(tmp_path: Path) -> None:
    assert_holds(write_tf(tmp_path, some_tensors()), some_tensors())


def test_an_index_of_several_blocks_is_read(tmp_path: Path) -> None:
    tensors = {f"{i:04d}" + "/name" * 12: np.array([i], np.float32) for i in range(9000)}
    prefix = write_tf(tmp_path, tensors)
    index = Path(f"{prefix}.index").read_bytes()
    footer = Cursor(index[-48:])
    _, _, place = footer.varint(), footer.varint(), (footer.varint(), footer.varint())
    assert len(list(bundle._pairs(bundle._block(index, *place)))) > 1
    assert_holds(prefix, tensors)


def test_a_compressed_index_is_read_as_tensorflow_reads_it(tmp_path: Path) -> None:
    """The published ones are compressed, as TensorFlow 1 did it; TensorFlow 2 only reads such."""
    tensors = {f"{'name/' * (i % 40)}{i:04d}": np.array([i], np.float32) for i in range(999)}
    prefix = write_tf(tmp_path, tensors)
    path = Path(f"{prefix}.index")
    block = bundle._join(bundle.read_table(path.read_bytes()).items())
    compressed = a_table_of(snappy(block), b"\1", last_key=max(tensors).encode())
    assert len(compressed) < len(block) / 2
    path.write_bytes(compressed)
    reader = tf.train.load_checkpoint(str(prefix))
    assert all(reader.get_tensor(name) == value for name, value in tensors.items())
    assert_holds(prefix, tensors)


def snappy(text: bytes) -> bytes:
    """Compress as the format's description has it, with all its kinds of copies."""
    out, seen, start, at = bytearray(varint(len(text))), dict[bytes, int](), 0, 0

    def literal(piece: bytes) -> None:
        if piece:
            size = len(piece) - 1
            out.extend(bytes([size << 2]) if size < 60 else b"\xf4" + struct.pack("<H", size))
            out.extend(piece)

    while at < len(text):
        found = seen.get(text[at : at + 4])
        seen[text[at : at + 4]] = at
        if found is None or at + 4 > len(text):
            at += 1
            continue
        literal(text[start:at])
        length = 4
        while length < 64 and at + length < len(text) and text[found + length] == text[at + length]:
            length += 1
        offset = at - found
        if length < 12 and offset < 2048:
            out.extend(bytes([offset >> 8 << 5 | (length - 4) << 2 | 1, offset & 255]))
        elif offset < 40_000:
            out.extend(bytes([(length - 1) << 2 | 2]) + struct.pack("<H", offset))
        else:
            out.extend(bytes([(length - 1) << 2 | 3]) + struct.pack("<I", offset))
        at += length
        start = at
    literal(text[start:])
    return bytes(out)


def test_bfloat16_is_read_as_the_float32_that_it_stands_for(tmp_path: Path) -> None:
    value = tf.cast(numbers("float32", 4, 6), tf.bfloat16)
    found = source(write_tf(tmp_path, {"x": value}))
    assert found.tensors["x"] == Stored("bfloat16", (4, 6))
    assert np.array_equal(found.read("x"), tf.cast(value, tf.float32))


def test_what_holds_no_numbers_is_seen_to(tmp_path: Path) -> None:
    tensors = {"text": np.array([b"x", b"yy"]), "x": numbers("float32", 2)}
    found = source(write_tf(tmp_path, tensors))
    assert found.tensors == {"text": Stored(None, (2,)), "x": Stored("float32", (2,))}


def test_what_is_written_is_what_tensorflow_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_checkpoint(tmp_path / "x", {n: Variable.of(value) for n, value in tensors.items()})
    reader = tf.train.load_checkpoint(str(tmp_path / "x"))
    assert reader.get_variable_to_shape_map().keys() == tensors.keys()
    for name, value in tensors.items():
        read = np.asarray(reader.get_tensor(name))
        assert read.dtype == value.dtype
        assert np.array_equal(read, value)


def test_tensorflow_checks_our_checksums(tmp_path: Path) -> None:
    """So that the test above says something about them."""
    write_checkpoint(tmp_path / "x", {"x": Variable.of(numbers("float32", 9))})
    data = tmp_path / "x.data-00000-of-00001"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with pytest.raises(tf.errors.DataLossError):
        tf.raw_ops.RestoreV2(
            prefix=str(tmp_path / "x"), tensor_names=["x"], shape_and_slices=[""], dtypes=["float"]
        )


def test_a_flipped_bit_in_a_tensor_names_it(tmp_path: Path) -> None:
    prefix = write_tf(tmp_path, {"a": numbers("float32", 9), "b": numbers("float32", 9)})
    data = Path(f"{prefix}.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[40] ^= 4
    data.write_bytes(content)
    found = source(prefix)
    found.read("a")
    with pytest.raises(ValueError, match=r"tensor 'b' of .* is damaged: its checksum is wrong"):
        found.read("b")


def test_a_partitioned_variable_is_called_one(tmp_path: Path) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"),
        tensor_names=["v", "v"],
        shape_and_slices=["4 2 0,2:0,2", "4 2 2,2:0,2"],
        tensors=[tf.ones((2, 2)), tf.ones((2, 2))],
    )
    with pytest.raises(ValueError, match="'v': a partitioned variable"):
        source(tmp_path / "x")


# Damaged and hostile index files.


def entry(**values: Any) -> bundle.Entry:
    described = {"dtype": "float32", "shape": (2,), "offset": 0, "size": 8, "crc32c": 0, **values}
    return bundle.Entry(**described)


def test_no_flipped_bit_changes_what_an_index_says(tmp_path: Path) -> None:
    prefix = write_tf(tmp_path, some_tensors())
    sound = Path(f"{prefix}.index").read_bytes()
    expected = bundle.read_index(sound)
    refused = 0
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        try:
            assert bundle.read_index(bytes(damaged)) == expected  # in padding, or unused filters
        except ValueError:
            refused += 1
    assert refused > len(sound) * 0.8


def test_a_truncated_index_is_an_error(tmp_path: Path) -> None:
    prefix = write_tf(tmp_path, some_tensors())
    sound = Path(f"{prefix}.index").read_bytes()
    for keep in range(len(sound)):
        with pytest.raises(ValueError, match="does not end with the footer of a table"):
            bundle.read_index(sound[:keep])


def a_table(pairs: list[tuple[bytes, bytes]]) -> bytes:
    header = number_field(1, 1)
    return bundle.write_table([(b"", header), *pairs])


def a_table_of(block: bytes, kind: bytes, *, again: int = 1, last_key: bytes = b"") -> bytes:
    """A table with this block, named so many times."""
    content = bytearray()

    def append(block: bytes, kind: bytes = b"\0") -> bytes:
        handle = varint(len(content)) + varint(len(block))
        checksum = bundle.mask(crc32c(block + kind))
        content.extend(block + kind + struct.pack("<I", checksum))
        return handle

    data = append(block, kind)
    filters = append(bundle._join([]))
    index = append(bundle._join([(last_key, data)] * again))
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    return bytes(content) + (filters + index).ljust(40, b"\0") + magic


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no header": (lambda: bundle.write_table([(b"x", b"")]), "no header"),
    "big-endian": (
        lambda: bundle.write_table([(b"", number_field(1, 1) + number_field(2, 1))]),
        "big-endian",
    ),
    "no data files": (lambda: bundle.write_table([(b"", b"")]), "counts 0 data files"),
    "many data files": (
        lambda: bundle.write_table([(b"", number_field(1, 10**9))]),
        "counts 1000000000 data files",
    ),
    "header no number": (
        lambda: bundle.write_table([(b"", bytes_field(1, b"x"))]),
        "counts b'x' data files",
    ),
    "entry of bytes": (lambda: a_table([(b"x", bytes_field(4, b"12"))]), "not described"),
    "shape a number": (lambda: a_table([(b"x", number_field(2, 3))]), "not described"),
    "entry ends early": (lambda: a_table([(b"x", b"\x12\x7f")]), "'x': ends 127 bytes early"),
    "endless number": (lambda: a_table([(b"x", b"\xff" * 20)]), "endless number"),
    "unknown kind": (lambda: a_table([(b"x", b"\x0b")]), "unknown kind 3"),
    "negative size": (
        lambda: a_table([(b"x", bytes_field(2, bytes_field(2, number_field(1, 2**64 - 1))))]),
        "its shape is impossible",
    ),
    "many dimensions": (
        lambda: a_table([(b"x", bytes_field(2, bytes_field(2, b"") * 99))]),
        "its shape is impossible",
    ),
    "size against shape": (
        lambda: bundle.write_index({"x": entry(size=12)}),
        r"12 bytes; float32 \(2,\) takes 8",
    ),
    "huge shape": (
        lambda: bundle.write_index({"x": entry(shape=(2**40, 2**40))}),
        "8 bytes; float32",
    ),
    "another data file": (
        lambda: a_table([(b"x", number_field(3, 7))]),
        "data file 7 of 1",
    ),
    "Snappy that ends early": (lambda: a_table_of(b"\x05\x10ab", b"\1"), "bytes early"),
    "Snappy that copies nothing": (lambda: a_table_of(b"\x05\x01\x09", b"\1"), "not there"),
    "Snappy that copies itself": (lambda: a_table_of(b"\x05\x00a\x01\x00", b"\1"), "not there"),
    "Snappy of another length": (lambda: a_table_of(b"\x05\x00a", b"\1"), "should hold 5 bytes"),
    "a Snappy bomb": (lambda: a_table_of(varint(2**31) + b"\x00a", b"\1"), "is too large"),
    "an unknown compression": (lambda: a_table_of(b"x", b"\5"), "unknown compression type 5"),
    "one block many times": (
        lambda: a_table_of(bundle._join([(b"", number_field(1, 1))]), b"\0", again=9),
        "overlap",
    ),
    "long keys of few bytes": (
        # Each key is the one before it and one byte more.
        lambda: a_table_of(
            b"".join(varint(i) + b"\1\0k" for i in range(20_000)) + struct.pack("<II", 0, 1), b"\0"
        ),
        "more than any checkpoint's index",
    ),
    "a block of nothing": (lambda: a_table_of(b"", b"\0"), "too short"),
    "many restarts": (lambda: a_table_of(b"\xff" * 4, b"\0"), "too short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_a_clear_error(name: str) -> None:
    make, expected = HOSTILE[name]
    with pytest.raises(ValueError, match=expected):
        bundle.read_index(make())


def test_snappy_copies_of_what_they_write_repeat_it() -> None:
    assert bundle.uncompress(b"\x0a" + b"\x04ab" + b"\x1e\x02\x00") == b"ababababab"


def test_long_literals_and_far_copies_are_uncompressed() -> None:
    text = bytes(range(256)) * 256
    literal = b"\xf4" + struct.pack("<H", len(text) - 1) + text
    far = b"\xff" + struct.pack("<I", len(text))  # 64 bytes from the start
    assert bundle.uncompress(varint(len(text) + 64) + literal + far) == text + text[:64]


def test_fields_come_back() -> None:
    message = number_field(1, 2**63) + bytes_field(2, b"xy") + fixed32_field(3, 7)
    assert list(fields(message)) == [(1, 2**63), (2, b"xy"), (3, 7)]
