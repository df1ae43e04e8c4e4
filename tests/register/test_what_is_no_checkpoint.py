"""Files that people bring in place of a checkpoint, by example and variation: each is called what
it is, by every command, with the cure; following the cure works where a test can follow it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2ml_torch.__main__ import main
from tests.helpers import checkpoint_factory as factory
from tests.register.brought import WEIGHTS, assert_converts, community, refused, write_tensorflow

Capture = pytest.CaptureFixture[str]


def zipped(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return content.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5585033776\n"
FILES: dict[str, tuple[str, bytes, str]] = {
    "pointer": ("pytorch_model.bin", LFS, "git-lfs pointer, .*run `git lfs pull`"),
    "pointer with CR LF": ("model.safetensors", LFS.replace(b"\n", b"\r\n"), "`git lfs pull`"),
    "pointer after a mark": ("model.pt", b"\xef\xbb\xbf" + LFS, "`git lfs pull`"),
    "annex": ("model.pt", b"/annex/objects/SHA256E-s55--4a6e.bin\n", "`git annex get model.pt`"),
    "page": ("pytorch_model.bin", b"\n<!DOCTYPE html><html>", "web page, .*fetch it again"),
    "page in UTF-16": ("model.bin", "<html>".encode("utf-16"), "web page, .*fetch it again"),
    "message of S3": ("model.bin", b"<Error><Code>AccessDenied</Code></Error>", "fetch it again"),
    "message in JSON": ("x.safetensors", b'{"error": "Repository not found"}', "text .*not found"),
    "message": ("pytorch_model.bin", b"Entry not found", "text .'Entry not found'.*fetch"),
    "empty": ("model.safetensors", b"", "is empty, .*fetch it again"),
    "zeros": ("pytorch_model.bin", bytes(9999), "filled with zeros, .*fetch it again"),
    "zip": ("gpt2.zip", zipped(a__vocab_txt=b"x"), "zip archive, .*unpack it and give the folder"),
    "zip named bin": ("pytorch_model.bin", zipped(pytorch_model=b"x"), "zip archive, .*unpack"),
    "cut zip": ("gpt2.zip", zipped(a=b"x" * 999)[:500], "cut off or damaged, .*fetch it again"),
    "tar.gz": ("gpt2.tar.gz", gzip.compress(b"x" * 999), "gzip file, .*unpack it"),
    "tar.bz2": ("gpt2.tbz", bz2.compress(b"x"), "bzip2 file, .*unpack it"),
    "tar.xz": ("gpt2.txz", lzma.compress(b"x"), "xz file, .*unpack it"),
    "7z": ("gpt2.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "7z archive, .*unpack it"),
    "7z in parts": ("gpt2.7z.002", b"\x17" * 99, "split archive, .*put the parts together"),
    "rar in parts": ("gpt2.part1.rar", b"Rar!\x1a\x07\1\0", "split archive, .*parts together"),
    "HDF5": ("best.weights", b"\x89HDF\r\n\x1a\n" + bytes(99), r"save_weights_as_checkpoint\("),
    "Keras 3": ("m.keras", zipped(**{"model.weights.h5": b"", "metadata.json": b""}), "Keras 3"),
    "aria2": ("model.bin.aria2", b"\0\1", "download that isn't finished"),
    "browser": ("Unconfirmed 71.crdownload", b"PK\3\4", "download that isn't finished"),
    "Xunlei": ("model.ckpt-7.data-00000-of-00001.xltd", b"x", "download that isn't finished"),
    "ONNX": ("gpt2.onnx", b"\x08\x07\x12\x07pytorch" + bytes(99), "an ONNX model, "),
    "GGUF": ("gpt2.gguf", b"GGUF\3\0\0\0" + bytes(99), "a GGUF file, .*made from"),
    "NumPy": ("w.npz", zipped(**{"a.npy": b"\x93NUMPY"}), "a NumPy archive"),
    "pickle": ("w.pkl", pickle.dumps({"a": np.zeros(3)}), r"model.state_dict\(\), FILE"),
    "TorchScript": ("s.pt", zipped(s__data_pkl=b""), "zip archive"),
    "frozen graph": ("frozen.pb", b"\n\x1c\n\x0bPlaceholder", "a TensorFlow graph, .*index"),
    "first format": ("model.ckpt", bytes(60) + bytes.fromhex("57fb808b247547db"), r"\(V1\)"),
    "PDF": ("paper.pdf", b"%PDF-1.5\n\xff", "a PDF document"),
    "text": ("readme.md", b"# GPT2-ML weights", "text .*give the folder or file with the weights"),
}
LEFT_ALONE = ("pickle", "TorchScript", "first format", "text")  # where something else stands beside


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_it_is_with_the_cure(
    name: str, tmp_path: Path, capfd: Capture
) -> None:
    file, content, expected = FILES[name]
    (tmp_path / file).write_bytes(content)
    assert_matches(expected, refused(tmp_path / file, capfd))
    if name not in LEFT_ALONE:
        assert_matches(expected, refused(tmp_path, capfd))


@pytest.mark.parametrize("name", ["pointer with CR LF", "message in JSON", "zip", "HDF5", "aria2"])
@pytest.mark.parametrize("words", [["info"], ["generate", "今"], ["serve"], ["check"]])
def test_every_command_does_so(words: list[str], name: str, tmp_path: Path, capfd: Capture) -> None:
    file, content, expected = FILES[name]
    (tmp_path / file).write_bytes(content)
    for given in (tmp_path / file, tmp_path):
        assert main([words[0], str(given), *words[1:]]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert_matches(expected, error)


def assert_matches(expected: str, text: str) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(text)


def test_a_checkpoint_given_to_another_command_is_sent_to_convert(
    tmp_path: Path, capfd: Capture
) -> None:
    prefix = write_tensorflow(tmp_path, WEIGHTS)
    for given in (prefix, Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")):
        assert main(["info", str(given)]) == 2
        assert "`gpt2ml convert` makes a model file of it" in capfd.readouterr().err
        assert_converts(given, capfd)


def test_what_lies_beside_a_checkpoint_does_not_hide_it(tmp_path: Path, capfd: Capture) -> None:
    write_tensorflow(tmp_path, WEIGHTS)
    (tmp_path / "graph.pbtxt").write_text('node { op: "Const" }')
    (tmp_path / "a-paper.pdf").write_bytes(b"%PDF-1.5")
    assert main(["info", str(tmp_path)]) == 2
    assert f"gpt2ml convert {tmp_path} out.safetensors" in capfd.readouterr().err
    assert_converts(tmp_path, capfd)


def test_the_cure_for_an_archive_works(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "a").mkdir()
    write_tensorflow(tmp_path / "a", WEIGHTS)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "inside/of/it")
    assert "unpack it (tar -xf) and give the folder" in refused(tmp_path / "a.tar", capfd)
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "b", filter="data")
    given = refused(tmp_path / "b", capfd).strip().rpartition("give ")[2]
    assert_converts(given, capfd)


def test_the_cure_for_a_saved_model_works(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    write_tensorflow(tmp_path / "saved" / "variables", WEIGHTS, "variables")
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\1")
    for given in (tmp_path / "saved", tmp_path / "saved" / "saved_model.pb"):
        error = refused(given, capfd)
        assert_converts(error.strip().rpartition("its weights are in ")[2], capfd)


def test_the_cure_for_a_pickled_module_works(tmp_path: Path, capfd: Capture) -> None:
    factory.write_beside(tmp_path)
    module = torch.nn.Module()
    for name, tensor in community("").items():
        module.register_buffer(name.replace(".", "_"), tensor)
    torch.save(module, tmp_path / "model.pt")
    assert "torch.save(model.state_dict(), FILE)" in refused(tmp_path / "model.pt", capfd)
    torch.save(community(), tmp_path / "model.pt")
    assert_converts(tmp_path / "model.pt", capfd)


@pytest.mark.parametrize("linked", ["nowhere", "../blobs/4a6e"])
def test_a_link_to_nothing_is_told(linked: str, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "pytorch_model.bin").symlink_to(linked)
    for given in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert f"is a link to {linked}, which is not there" in refused(given, capfd)


@pytest.mark.parametrize("partial", [".crdownload", ".aria2", ".part"])
def test_what_is_still_coming_is_no_missing_file(
    partial: str, tmp_path: Path, capfd: Capture
) -> None:
    prefix = write_tensorflow(tmp_path, WEIGHTS)
    data = Path(f"{prefix}.data-00000-of-00001")
    data.rename(f"{data}{partial}")
    assert f"is not there yet: {data.name}{partial} is its unfinished download" in refused(
        tmp_path, capfd
    )
