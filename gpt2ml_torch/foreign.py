"""Recognise files that are not a model or a checkpoint, by their content or name.

People bring web pages, archives, pointers of git-lfs and unfinished downloads. The error says what
the file is and what to do about it.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

_HEAD = 512  # bytes at the start of a file that are read
_MESSAGE = 4096  # bytes; a longer text is not a message that a server sent in place of a file
_SHOWN = 60  # characters of a text that an error quotes
# Suffixes that programs append to a file's name until its download is complete.
_PARTIAL = (
    ".aria2", ".crdownload", ".part", ".partial", ".download", ".opdownload", ".!qb", ".!ut",
    ".xltd", ".td", ".downloading", ".tmp", ".filepart", ".incomplete", ".dwnl", ".!bt", ".bc!",
    ".baiduyun.p.downloading",
)  # fmt: skip
_SPLIT = re.compile(r"\.(?:7z|zip|rar|tar|gz|tgz|bz2|xz)\.\d{2,4}|\.part\d+\.rar|\.[zr]\d\d", re.I)
_SHARD = re.compile(r"\.data-\d+-of-\d+$")

_CHECKPOINTS = (".index", ".bin", ".pt", ".pth", ".ckpt")
_MOST = 200  # the number of files of a folder that are examined
_FETCH = "fetch it again"
_CONVERT = "`gpt2ml convert` makes a model file of it"
_UNPACK = "unpack it and give the folder"
_ORIGIN = "give the checkpoint that it was made from"
_GRAPH = "give the checkpoint (.index, .data) of its weights"
_WEIGHTS = "give the folder or file with the weights"
_KERAS = (
    "give a TensorFlow checkpoint: in bert4keras build the model with "
    "return_keras_model=False and call its save_weights_as_checkpoint(PREFIX)"
)


class _Kind(NamedTuple):
    """What a file is, and what the user should do instead."""

    what: str
    cure: str


_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/",
        b"version http://git-media.io/")  # fmt: skip
_PAGE = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<meta", b"<!--")
_BY_MAGIC = (
    (0, b"\x89HDF\r\n\x1a\n", _Kind("an HDF5 file, as Keras's save_weights writes", _KERAS)),
    (0, b"\x1f\x8b", _Kind("a gzip file", "unpack it (gunzip, or tar -xzf)")),
    (0, b"BZh", _Kind("a bzip2 file", "unpack it (bunzip2, or tar -xjf)")),
    (0, b"\xfd7zXZ\0", _Kind("an xz file", "unpack it (unxz, or tar -xJf)")),
    (0, b"\x28\xb5\x2f\xfd", _Kind("a Zstandard file", "unpack it (unzstd)")),
    (0, b"\x04\x22\x4d\x18", _Kind("an LZ4 file", "unpack it (unlz4)")),
    (0, b"7z\xbc\xaf\x27\x1c", _Kind("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", _Kind("a rar archive", _UNPACK)),
    (257, b"ustar", _Kind("a tar archive", "unpack it (tar -xf) and give the folder")),
    (0, b"GGUF", _Kind("a GGUF file", _ORIGIN)),
    (0, b"lmgg", _Kind("a GGML file", _ORIGIN)),
    (0, b"fmgg", _Kind("a GGML file", _ORIGIN)),
    (0, b"tjgg", _Kind("a GGML file", _ORIGIN)),
    (4, b"TFL3", _Kind("a TensorFlow Lite model", _ORIGIN)),
    (0, b"\x93NUMPY", _Kind("a NumPy array", _ORIGIN)),
    (0, b"%PDF", _Kind("a PDF document", _WEIGHTS)),
    (0, b"\x89PNG", _Kind("an image", _WEIGHTS)),
    (0, b"\xff\xd8\xff", _Kind("an image", _WEIGHTS)),
    (0, b"\x7fELF", _Kind("a program", _WEIGHTS)),
    (0, b"MZ", _Kind("a program", _WEIGHTS)),
    (0, b"SQLite format 3", _Kind("an SQLite database", _WEIGHTS)),
    (0, b"PAR1", _Kind("a Parquet table", _WEIGHTS)),
    (0, b"d8:announce", _Kind("a torrent", "download what it describes, and give that")),
    (0, b"\0\5\x16\7", _Kind("macOS metadata of a file (AppleDouble)", "give the file itself")),
)  # fmt: skip
# Formats without a signature at a fixed offset.
_BY_SUFFIX = {
    ".onnx": _Kind("an ONNX model", _ORIGIN),
    ".msgpack": _Kind("a Flax checkpoint", _ORIGIN),
    ".pb": _Kind("a TensorFlow graph", _GRAPH),
    ".pbtxt": _Kind("a TensorFlow graph", _GRAPH),
    ".distcp": _Kind(
        "a part of a distributed checkpoint",
        "join its folder into one file with `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER FILE.pt`",
    ),
    ".torrent": _Kind("a torrent", "download what it describes, and give that"),
}  # fmt: skip
# The last bytes of a TensorFlow table: an index file, or a whole checkpoint of format V1.
_TABLE_END = bytes.fromhex("57fb808b247547db")


def check(path: Path, *, wanted: str = "checkpoint", text: bool = False) -> None:
    """Raise `ValueError` if a file is recognised as something other than `wanted`.

    The error says what the file is and what to do. `text` allows text files. Raises `OSError` if
    the file can't be read.
    """
    if fault := fault_of(path, wanted=wanted, text=text):
        raise ValueError(fault)


def fault_of(path: Path, *, wanted: str = "checkpoint", text: bool = False) -> str | None:
    """What a file is instead of `wanted`, and what to do; None if it isn't recognised."""
    if path.name.startswith("._"):
        return f"{path} is macOS metadata of another file; give {path.name[2:]} instead"
    if fault := _unfinished_fault(path):
        return fault
    if not path.is_file():
        return None
    head = _head(path)
    found = _failed_download(path, head) or _kind(path, head)
    found = found or (None if text else _no_weights(path, head))
    return f"{path} is {found.what}, not a {wanted}: {found.cure}" if found else None


def failed_download(path: Path, *, wanted: str) -> str | None:
    """What a text file is instead of `wanted` after a failed download, and what to do, or None."""
    if path.suffix.lower() != ".tmp" and (fault := _unfinished_fault(path)):
        return fault
    head = _head(path)
    if head.lstrip().startswith((b"<!--", b"<?")):  # the user's own text may start like this
        return None
    found = _failed_download(path, head)
    return f"{path} is {found.what}, not a {wanted}: {found.cure}" if found else None


def _unfinished_fault(path: Path) -> str | None:
    if path.suffix.lower() in _PARTIAL:
        return f"{path} is a download that isn't finished; finish it or {_FETCH}"
    if path.is_file() and (partial := unfinished(path)):
        return (
            f"{path} isn't complete: {partial.name} beside it shows that the download has not "
            f"finished; finish it or {_FETCH}"
        )
    return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def absence_of(path: Path) -> str | None:
    """Why a file is missing, and what to do; None if nothing on the disk explains it."""
    if partial := unfinished(path):
        return f"{path} is not there yet: {partial.name} is its unfinished download; finish it"
    if path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which is not there; {_FETCH}"
    return None


def unfinished(path: Path) -> Path | None:
    """The partial download beside `path`, if there is one; `path` itself need not exist."""
    suffixes = (suffix for suffix in _PARTIAL if suffix not in (".partial", ".tmp"))
    names = (path.with_name(path.name + suffix) for suffix in suffixes)
    return next((name for name in names if name.is_file()), None)


def in_place_of_model(path: Path) -> str | None:
    """What is at the path of a model file that is missing or can't be read, and what to do.

    None if it isn't recognised.
    """
    try:
        if path.with_name(path.name + ".index").is_file():
            return f"{path} is a TensorFlow checkpoint; {_CONVERT}"
        if not path.exists():
            return absence_of(path)
        if path.suffix in (".index", ".meta") or _SHARD.search(path.name):
            return f"{path} belongs to a TensorFlow checkpoint; {_CONVERT}"
        return fault_of(path, wanted="model file")
    except (OSError, ValueError):
        return None


def in_place_of_models(folder: Path) -> str | None:
    """What is in a folder without a model file, and what to do.

    None if nothing is recognised, or if the folder may hold a checkpoint.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))[:_MOST]
        weights = [path for path in paths if path.suffix in _CHECKPOINTS]
        faults = (fault_of(path, wanted="model file", text=True) for path in weights or paths)
        return next((fault for fault in faults if fault), None)
    except (OSError, ValueError):
        return None


def is_tensorflow_table(path: Path) -> bool:
    """Whether a file ends as the index of a TensorFlow checkpoint does."""
    with path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - len(_TABLE_END), 0))
        return file.read() == _TABLE_END


def _failed_download(path: Path, head: bytes) -> _Kind | None:
    """A pointer to the file, or a web page that was saved in its place."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_LFS):
        return _Kind("a git-lfs pointer", f"run `git lfs pull` in {path.parent} to get the file")
    if b".git/annex/objects" in start[:100] or start.startswith(b"/annex/objects/"):
        return _Kind("a git-annex pointer", f"run `git annex get {path.name}` in its folder")
    if start.startswith(_PAGE) or (head[:2] in (b"\xff\xfe", b"\xfe\xff") and b"<\0" in head[:6]):
        return _Kind("a web page", f"the download saved a page in place of the file; {_FETCH}")
    if start.startswith((b"<?xml", b"<error")):
        return _Kind("a message in XML, or a web page", f"the download failed; {_FETCH}")
    return None


def _kind(path: Path, head: bytes) -> _Kind | None:
    """The kind of a file by its first bytes or its name."""
    if _SPLIT.search(path.name) and _SPLIT.search(path.name).end() == len(path.name):  # type: ignore[union-attr]
        return _Kind("a part of a split archive", f"put the parts together, {_UNPACK}")
    for place, magic, kind in _BY_MAGIC:
        if head[place : place + len(magic)] == magic:
            return kind
    if path.name == "saved_model.pb" and (path.parent / "variables").is_dir():
        return _Kind("the graph of a SavedModel", f"its weights are in {path.parent}/variables")
    if path.suffix.lower() in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix.lower()]
    return _zip(path) if head.startswith(b"PK") else None


def _no_weights(path: Path, head: bytes) -> _Kind | None:
    """The kind of a file without weights: empty, zeros or text."""
    if len(head) < 8:
        return _Kind(f"{len(head)} bytes long" if head else "empty", _FETCH)
    if not any(head) and len(head) == _HEAD and not _SHARD.search(path.name):
        return _Kind("filled with zeros", f"the download was not finished; {_FETCH}")
    if path.suffix != ".index" and is_tensorflow_table(path):
        return _Kind(
            "in TensorFlow's first format (V1)",
            "restore it and save it again with tf.compat.v1.train.Saver",
        )
    try:
        shown = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # the last character may be cut off
            return None
        shown = head[: error.start].decode("utf-8-sig")
    if not all(character.isprintable() or character.isspace() for character in shown):
        return None
    size = path.stat().st_size
    quoted = repr(" ".join(shown.split())[:_SHOWN])
    if size > _MESSAGE or path.suffix.lower() in (".txt", ".md", ".py", ".json", ".yaml", ".sh"):
        return _Kind(f"text ({quoted})", _WEIGHTS)
    return _Kind(f"text ({quoted})", f"the download saved a message in its place; {_FETCH}")


def _zip(path: Path) -> _Kind | None:
    """The kind of a zip archive; None for a file that `torch.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, RuntimeError):
        # Cut off or damaged; for a PyTorch file the converter's own reader reports it.
        is_archive = path.suffix.lower() in (".zip", ".npz", ".keras")
        return _Kind("a zip archive that is cut off or damaged", _FETCH) if is_archive else None
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and "data.pkl" in last:
        return _Kind(
            "a TorchScript program", "save the state_dict() of the original module instead"
        )
    if "data.pkl" in last:
        return None
    if any(name.endswith(".npy") for name in names):
        return _Kind("a NumPy archive (npz)", _ORIGIN)
    if {"model.weights.h5", "metadata.json"} <= last:
        return _Kind("a Keras 3 model", _KERAS)
    return _Kind("a zip archive", _UNPACK)
