"""A damaged tensor is found, and named, wherever a file is checked."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convert.__main__ import main as convert
from gpt2ml_torch import GPT2ML
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.modelfile.checksum import crc32c, table_crc32c
from gpt2ml_torch.modelfile.format import SLOT, expected_shapes, slot_shapes
from gpt2ml_torch.modelfile.writer import save
from tests.helpers.old_files import CONFIG, VOCAB, numbers

WEIGHTS = {name: numbers(name, shape) for name, shape in expected_shapes(CONFIG).items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    with ModelWriter(path, CONFIG, dtype="float32", vocab=VOCAB, slots=True) as writer:
        for name, weight in WEIGHTS.items():
            writer.write(name, weight)
        for name, shape in slot_shapes(CONFIG).items():
            writer.write(SLOT + name, numbers(name, shape).abs())
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def places(path: Path) -> dict[str, tuple[int, ...]]:
    """The first, a middle and the last byte of each tensor."""
    with ModelFile.open(path) as file:
        slots = {SLOT + name: info for name, info in file.slots.items()}
        return {
            name: (info.start, (info.start + info.end) // 2, info.end - 1)
            for name, info in (file.tensors | slots).items()
        }


def test_the_checksum_is_crc32c_with_and_without_the_package() -> None:
    for function in (crc32c, table_crc32c):
        assert function(b"123456789") == 0xE3069283  # the published check value
        assert function(b"") == 0
        assert function(b"6789", function(b"12345")) == 0xE3069283
        assert function(memoryview(bytes(32))) == 0x8A9136AA  # RFC 3720, B.4


def test_a_flipped_bit_anywhere_names_its_tensor(path: Path) -> None:
    sound = path.read_bytes()
    with ModelFile.open(path) as file:
        file.verify()
    for name, (first, middle, last) in places(path).items():
        for place in (first, middle, last):
            path.write_bytes(sound)
            flip(path, place)
            with ModelFile.open(path) as file:
                with pytest.raises(ValueError, match=f"tensor '{name}' is damaged"):
                    file.verify()
                with pytest.raises(ValueError, match=f"tensor '{name}' is damaged"):
                    file.tensor(name)


def test_an_edited_vocabulary_is_found(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace("春".encode(), "秋".encode()))
    with ModelFile.open(path) as file, pytest.raises(ValueError, match="metadata are damaged"):
        file.verify()


def test_every_command_that_reads_all_weights_refuses_a_damaged_one(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(path), "--verify"]) == 0
    assert "match their checksums" in capsys.readouterr().out
    assert main(["info", str(path), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    flip(path, places(path)["blocks.1.attention.qkv.weight"][1])
    out = path.with_name("out")
    for run in (
        lambda: main(["info", str(path), "--verify"]),
        lambda: main(["quantize", str(path), "--out", str(out)]),
        lambda: convert(["--to-tf", str(path), str(out)]),
    ):
        assert run() == 2
        error = capsys.readouterr().err
        assert "tensor 'blocks.1.attention.qkv.weight' is damaged" in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_a_flipped_bit_of_a_statistic_is_not_converted_back(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(path, places(path)["optimizer.blocks.0.mlp.up.weight.vr"][0])
    assert convert(["--to-tf", str(path), str(path.with_name("out"))]) == 2
    assert "tensor 'optimizer.blocks.0.mlp.up.weight.vr' is damaged" in capsys.readouterr().err


def test_the_order_of_writing_and_the_threads_do_not_show(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with (
        ModelWriter(other, CONFIG, dtype="float32", vocab=VOCAB, slots=True) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        for name, shape in reversed(slot_shapes(CONFIG).items()):
            pool.submit(writer.write, SLOT + name, numbers(name, shape).abs())
        for name, weight in reversed(WEIGHTS.items()):
            pool.submit(writer.write, name, weight)
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["token_embedding.weight", "blocks.1.output_norm.bias"])
def test_a_tensor_that_is_not_finite_is_not_written(
    dtype: str, value: float, name: str, tmp_path: Path
) -> None:
    weights = {key: weight.to(getattr(torch, dtype)) for key, weight in WEIGHTS.items()}
    for place in (0, -1):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[place] = value
        with pytest.raises(ValueError, match=f"tensor '{name}' has NaN or infinity"):
            save(tmp_path / "m", weights, CONFIG)
        assert not list(tmp_path.iterdir())
    save(tmp_path / "m", weights, CONFIG, allow_non_finite=True)
    with ModelFile.open(tmp_path / "m") as file:
        file.verify()
        found = file.tensor(name)
    assert torch.equal(found.view(torch.uint8), weights[name].view(torch.uint8))


def test_quantize_names_a_tensor_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "m", tmp_path / "out"
    for name in ("blocks.0.mlp_norm.weight", "blocks.0.mlp.up.weight"):
        weights = WEIGHTS | {name: WEIGHTS[name].clone()}
        weights[name].view(-1)[3] = float("nan")
        save(path, weights, CONFIG, allow_non_finite=True)
        assert main(["quantize", str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"tensor '{name}'" in error
        assert error.count("\n") == 1
    save(
        path,
        WEIGHTS | {"embedding_norm.bias": torch.full((16,), float("inf"))},
        CONFIG,
        allow_non_finite=True,
    )
    assert main(["quantize", str(path), "--out", str(out)]) == 2
    assert "--allow-non-finite" in capsys.readouterr().err
    assert main(["quantize", str(path), "--out", str(out), "--allow-non-finite"]) == 0


def test_a_scale_that_is_not_finite_is_found_while_loading(tmp_path: Path) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "packed.safetensors"
    save(path, WEIGHTS, CONFIG)
    assert main(["quantize", str(path), "--out", str(out)]) == 0
    sound = out.read_bytes()
    with ModelFile.open(out) as file:
        start = file.tensors["blocks.1.mlp.down.weight_scale"].start
    for bits in (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"):  # NaN and both infinities in bfloat16
        out.write_bytes(sound[:start] + bits + sound[start + 2 :])
        with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.down\.weight_scale' has NaN"):
            GPT2ML.from_pretrained(out)
    shutil.rmtree(tmp_path)
