"""Files that people bring in place of a checkpoint, recognised so that the error names the cure."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEAD = 512  # bytes
# What a download that isn't finished is called, after the name that it will have.
_PARTIAL = (
    ".aria2", ".crdownload", ".part", ".partial", ".download", ".opdownload", ".!qb", ".!ut",
    ".xltd", ".td", ".downloading", ".tmp", ".filepart", ".incomplete", ".baiduyun.p.downloading",
)  # fmt: skip
_ARCHIVES = (
    (b"\x1f\x8b", "a gzip file", "unpack it (gunzip, or tar -xzf)"),
    (b"BZh", "a bzip2 file", "unpack it (bunzip2, or tar -xjf)"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it (unxz, or tar -xJf)"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it"),
)
_HDF5 = b"\x89HDF\r\n\x1a\n"
_KERAS_CURE = (
    "a TensorFlow checkpoint is wanted: in bert4keras build the model with "
    "return_keras_model=False and call its save_weights_as_checkpoint(PREFIX)"
)
_FETCH = "fetch it again"


def check(path: Path) -> None:
    """Raise `ValueError` for a file that is something else than part of a checkpoint, saying what
    it is and what to do; `OSError` where it can't be read."""
    if fault := fault_of(path):
        raise ValueError(fault)


def fault_of(path: Path) -> str | None:
    """What a file is in place of a checkpoint's, and what to do; None where nothing tells."""
    if path.name.startswith("._"):
        return f"{path} is what a Mac keeps beside a file; give {path.name[2:]} instead"
    if path.suffix.lower() in _PARTIAL:
        return f"{path} is a download that isn't finished; finish it or {_FETCH}"
    if not path.is_file():
        return None
    if partial := unfinished(path):
        return (
            f"{path} isn't complete: {partial.name} beside it says that the download goes on; "
            f"finish it or {_FETCH}"
        )
    with path.open("rb") as file:
        head = file.read(_HEAD)
    found = _by_content(path, head)
    return f"{path} is {found[0]}, not a checkpoint: {found[1]}" if found else None


def unfinished(path: Path) -> Path | None:
    """A file beside `path`, whether that is there or not, that says that its download goes on."""
    names = (path.with_name(path.name + suffix) for suffix in _PARTIAL if suffix != ".partial")
    return next((name for name in names if name.is_file()), None)


def _by_content(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file's first bytes show, and the cure."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of git-lfs", f"run `git lfs pull` in {path.parent} to get the file itself"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<script", b"<meta")):
        return "a web page", f"the download saved a page in place of the file; {_FETCH}"
    if head.startswith(_HDF5):
        return "an HDF5 file, as Keras's save_weights writes", _KERAS_CURE
    for magic, what, cure in _ARCHIVES:
        if head.startswith(magic):
            return what, cure
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it (tar -xf) and give the folder"
    if head.startswith(b"GGUF"):
        return "a GGUF file", "give the checkpoint that it was made from"
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array", "give the checkpoint that it was made from"
    if head.startswith(b"\0\5\x16\7"):
        return "what a Mac keeps beside a file (AppleDouble)", "give the file itself"
    return _zip(path) if head.startswith(b"PK") else None


def _zip(path: Path) -> tuple[str, str] | None:
    """What a zip archive is, unless it is PyTorch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None  # cut off or damaged: the reader of PyTorch's files says so
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and "data.pkl" in last:
        return "a TorchScript program", "save the state_dict() of the module that it was made from"
    if "data.pkl" in last:
        return None
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (npz)", "give the checkpoint that it was made from"
    if {"model.weights.h5", "metadata.json"} <= last:
        return "a model of Keras 3", _KERAS_CURE
    return "a zip archive", "unpack it and give the folder"
