"""Pickled state dicts: checksums, the ways in which tensors lie in memory, and what wraps them."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from convert.pytorch_bin import PyTorchFile
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory
from tests.helpers.damages import flip

WEIGHTS = factory.tf_weights()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the community's file, its configuration and vocabulary."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    factory.write_beside(folder)
    torch.save(factory.community_state_dict(WEIGHTS), folder / "pytorch_model.bin")
    return folder


def assert_converts(source: Path, capfd: pytest.CaptureFixture[str] | None = None) -> str:
    """Convert; the weights must equal the TensorFlow checkpoint's. Returns the summary."""
    out = source.parent / "out.safetensors"
    assert main([str(source), str(out), "--force"]) == 0
    found = ModelFile.open(out).state_dict()
    expected = factory.expected_tensors(WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    out.unlink()
    return capfd.readouterr().out if capfd else ""


def assert_refused(source: Path, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out.safetensors"
    assert main([str(source), str(out)]) == 2
    stderr = capfd.readouterr().err
    assert re.search(expected, stderr), stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


# Checksums.


def data_of(path: Path) -> list[tuple[str, int, int]]:
    """Of each record of the archive: name, where its bytes begin, and how many they are."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        result = []
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
            start = member.header_offset + 30 + int(lengths.sum())
            result.append((member.filename, start, member.file_size))
        return result


def test_a_flipped_bit_in_any_weight_names_a_tensor(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "pytorch_model.bin"
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    records = [r for r in data_of(path) if "/data/" in r[0] and r[2] > 1000]
    for _, start, size in (records[0], records[len(records) // 2]):
        path.write_bytes(sound)
        flip(path, start + int(random.integers(size)))
        capfd.readouterr()
        assert_refused(path, r"tensor '.*' of .* is damaged: its checksum \(CRC-32\)", capfd)


def test_a_flipped_bit_in_the_pickle_is_no_other_model(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "pytorch_model.bin"
    _, start, size = next(r for r in data_of(path) if r[0].endswith("data.pkl"))
    for place in range(start, start + size, 97):
        flip(path, place)
        assert_refused(path, r"checksum \(CRC-32\) of its data.pkl is wrong", capfd)
        flip(path, place)
    assert_converts(path)


def test_the_summary_says_what_was_verified(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = assert_converts(folder / "pytorch_model.bin", capfd)
    assert "verified    the CRC-32 of every tensor" in said


def test_the_summary_says_that_the_old_format_has_no_checksums(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = factory.community_state_dict(WEIGHTS)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    said = assert_converts(folder / "pytorch_model.bin", capfd)
    assert "verified    nothing: this file format has no checksums" in said


def test_a_file_written_without_checksums_is_read_and_said_to_be(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(factory.community_state_dict(WEIGHTS), folder / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    said = assert_converts(folder / "pytorch_model.bin", capfd)
    assert "verified    nothing" in said


# Tensors in memory.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_tensor_is_read_as_pytorch_reads_it(dtype: str, legacy: bool, tmp_path: Path) -> None:
    base = torch.randn(24, 36).to(getattr(torch, dtype))
    state = {
        "plain": base,
        "transposed": base.T,
        "rows": base[3:9],
        "columns": base[:, 5:11],
        "every other": base[::2, ::3],
        "one": base[0, 0],
        "none": base[:0],
        "vector": base[:, 7],
        "parameter": torch.nn.Parameter(base[1]),
        "permuted": base.view(4, 6, 36).permute(2, 0, 1),
        "negative": torch.complex(base.float(), base.float()).conj().imag,
    }
    path = tmp_path / "x.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    source = PyTorchFile(path)
    for name, value in torch.load(path, weights_only=True).items():
        wanted = value.detach().resolve_neg()
        wanted = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
        assert np.array_equal(source.read(name), wanted.numpy()), name
        assert source.tensors[name].shape == tuple(value.shape)


def test_one_storage_may_hold_all_weights(folder: Path) -> None:
    state = factory.community_state_dict(WEIGHTS)
    names = [name for name in state if name != "lm_head.weight"]
    flat = torch.cat([state[name].float().reshape(-1) for name in names])
    pieces = flat.split([state[name].numel() for name in names])
    views = {n: p.view(state[n].shape) for n, p in zip(names, pieces, strict=True)}
    torch.save(views, folder / "pytorch_model.bin")
    assert_converts(folder / "pytorch_model.bin")


NORM = "transformer.h.1.ln_2.bias"
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(8).to_sparse(), "a sparse tensor"),
    "compressed rows": (lambda: torch.eye(8).to_sparse_csr(), "a sparse tensor"),
    "no memory": (lambda: torch.empty(64, device="meta"), "a tensor on the device meta"),
    "expanded": (lambda: torch.zeros(1).expand(64), "overlap each other in memory"),
    "overlapping": (
        lambda: torch.zeros(40).as_strided((8, 8), (4, 1)),
        "overlap each other in memory",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8),
        "a quantised tensor",
    ),
    "integers": (lambda: torch.zeros(64, dtype=torch.int8), "int8, expected floating point"),
    "float8": (lambda: torch.zeros(64).to(torch.float8_e4m3fn), "float8"),
    "complex": (lambda: torch.zeros(64, dtype=torch.complex64), "complex64"),
    "a list": (lambda: [1.0] * 64, "no numbers"),
    "text": (lambda: "x", "no numbers"),
    "a device": (lambda: torch.device("cpu"), "no numbers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_weight_that_is_no_plain_tensor_is_named(
    kind: str, legacy: bool, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = ODD[kind]
    state = {**factory.community_state_dict(WEIGHTS), NORM: make()}
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert_refused(path, f"'h.1.ln_2.bias' holds .*{expected}", capfd)


# What stands around the state dict, and before the names.


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in factory.community_state_dict(WEIGHTS).items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("transformer.", "model.", 1),
        lambda name: name.replace("transformer.", "", 1),
        lambda name: name.replace("transformer.", "net.decoder.", 1),
    ],
)
def test_prefixes_of_other_libraries_are_understood(
    change: Callable[[str], str], folder: Path
) -> None:
    torch.save(renamed(change), folder / "pytorch_model.bin")
    assert_converts(folder / "pytorch_model.bin")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}, "lr": 1e-4}},
        lambda state: {"model_state_dict": state, "loss": 0.5, "rng": torch.zeros(9).byte()},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_a_state_dict_may_stand_in_a_dictionary(
    wrap: Callable[[Any], Any], legacy: bool, folder: Path
) -> None:
    state = wrap(factory.community_state_dict(WEIGHTS))
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert_converts(path)


def test_a_models_own_state_dict_is_read(folder: Path) -> None:
    torch.save(factory.expected_tensors(WEIGHTS), folder / "model.pt")
    assert_converts(folder / "model.pt")


def test_pickles_of_every_protocol_are_read(folder: Path) -> None:
    state = factory.community_state_dict(WEIGHTS)
    for protocol in range(2, 6):
        path = folder / "pytorch_model.bin"
        torch.save(state, path, pickle_protocol=protocol)
        assert_converts(path)


def test_it_is_read_without_pytorch(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from convert.__main__ import main\n"
        f"sys.exit(main([{str(folder)!r}, {str(folder / 'out')!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_hostile_pickle_costs_neither_time_nor_memory(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A list of many, made into tuples and dictionaries again and again."""
    path = folder / "pytorch_model.bin"
    many = b"(" + b"K\1" * 200_000 + b"lq\0"
    calls = {
        "size": b"ctorch\nSize\n" + b"h\0\x85R0",
        "dictionary": b"ccollections\nOrderedDict\n" + b"h\0\x85R0",
    }
    for call in calls.values():
        pickle = b"\x80\2" + many + call * 20_000 + b"}."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle)
        assert_refused(path, "is damaged|not a GPT2_ML", capfd)


def test_the_published_file_is_said_to_be_it(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import published

    monkeypatch.setattr(published, "may_be", lambda size, kind: True)
    monkeypatch.setattr(published, "by_hash", lambda sha256: published.PUBLISHED[0])
    shutil.copy(folder / "pytorch_model.bin", folder / "copy.bin")
    assert "verified    the SHA-256 is the published one" in assert_converts(
        folder / "copy.bin", capfd
    )
