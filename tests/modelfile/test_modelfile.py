"""The one file: what goes in comes out, and nothing that is not ours gets in."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.modelfile.format import expected_shapes, expected_slots
from gpt2ml_torch.modelfile.writer import save

CONFIG = GPT2MLConfig(
    vocab_size=21,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=9,
)
VOCAB = "\n".join(["[PAD]", "a\u2028", *map(str, range(19))])


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(CONFIG).items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(path, weights(), CONFIG, vocab=VOCAB, source={"name": "x"}, generation={"top_k": 5})
    return path


def test_metadata_come_back(path: Path) -> None:
    metadata = ModelFile.open(path)
    assert metadata.config == CONFIG
    assert metadata.vocab == VOCAB
    assert metadata.source == {"name": "x"}
    assert metadata.generation == {"top_k": 5}
    assert metadata.dtype == "float32"
    assert {name: info.shape for name, info in metadata.tensors.items()} == (
        expected_shapes(CONFIG)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = weights(dtype)
    saved["embedding_norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    save(tmp_path / "m", saved, CONFIG, allow_non_finite=True)
    for loaded in (ModelFile.open(tmp_path / "m").state_dict(), load_file(tmp_path / "m")):
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_weights_are_converted_on_request(path: Path) -> None:
    loaded = ModelFile.open(path).state_dict(dtype=torch.bfloat16)
    for name, tensor in weights().items():
        assert torch.equal(loaded[name], tensor.bfloat16())


def test_changing_loaded_weights_does_not_change_the_file(path: Path) -> None:
    before = path.read_bytes()
    ModelFile.open(path).state_dict()["token_embedding.weight"].zero_()
    assert path.read_bytes() == before


def test_the_data_begin_aligned(path: Path) -> None:
    tensors = ModelFile.open(path).tensors.values()
    assert min(info.start for info in tensors) % 64 == 0
    assert all(info.start % 4 == 0 for info in tensors)


def test_a_model_may_be_saved_over_the_file_that_it_is_mapped_from(path: Path) -> None:
    loaded = ModelFile.open(path).state_dict()
    save(path, loaded, CONFIG)
    assert torch.equal(
        ModelFile.open(path).state_dict()["blocks.0.mlp.up.weight"],
        weights()["blocks.0.mlp.up.weight"],
    )


def test_permissions_are_those_of_any_new_file(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_symbolic_link_stays_one(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    save(link, weights(torch.float16), CONFIG)
    assert link.is_symlink()
    assert ModelFile.open(path).dtype == "float16"


def test_a_writer_that_fails_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fail() -> None:
        with ModelWriter(path, CONFIG, dtype=torch.float32, overwrite=True) as writer:
            writer.write("embedding_norm.bias", torch.zeros(12))

    with pytest.raises(ValueError, match=r"never written: blocks\.0"):
        fail()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_two_writers_of_one_file_do_not_meet(path: Path) -> None:
    with (
        pytest.raises(OSError, match="another process is writing"),
        ModelWriter(path, CONFIG, dtype=torch.float32, overwrite=True),
    ):
        save(path, weights(), CONFIG)


def test_what_a_killed_writer_left_is_no_obstacle(path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"x" * 100_000)
    save(path, weights(), CONFIG)
    assert ModelFile.open(path).config == CONFIG
    assert not partial.exists()


def test_an_existing_file_is_kept_unless_told(path: Path) -> None:
    with pytest.raises(FileExistsError):
        save(path, weights(), CONFIG, overwrite=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("embedding_norm.bias"), "lacks .embedding_norm.bias"),
        (lambda w: w.update(x=torch.zeros(1)), "has unknown .x"),
        (lambda w: w.update({"embedding_norm.bias": torch.zeros(13)}), r"shape \(13,\)"),
        (lambda w: w.update({"embedding_norm.bias": torch.zeros(12).half()}), "several dtypes"),
    ],
)
def test_wrong_weights_are_not_saved(
    change: Callable[[dict[str, torch.Tensor]], Any], expected: str, tmp_path: Path
) -> None:
    changed = weights()
    change(changed)
    with pytest.raises(ValueError, match=expected):
        save(tmp_path / "m", changed, CONFIG)
    assert os.listdir(tmp_path) == []


# Damaged and hostile files: each a function of the header's JSON, or of the whole file's bytes.


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, data = _read(path)
    change(header)
    return _pack(json.dumps(header).encode(), data)


def _pack(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _meta(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["__metadata__"].update(values)


def _config(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return _meta(config=json.dumps({**CONFIG.to_dict(), **values}))


def _entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["embedding_norm.bias"].update(values)


def _shift(by: int) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> None:
        start, end = header["embedding_norm.bias"]["data_offsets"]
        header["embedding_norm.bias"]["data_offsets"] = [start + by, end + by]

    return change


HOSTILE_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (_shift(-48), "overlaps"),
    "out of range": (_shift(10**12), "damaged|truncated"),
    "negative": (_entry(data_offsets=[-48, 0]), "impossible shape or place"),
    "reversed": (_entry(data_offsets=[48, 0]), "takes 48 bytes, its place has -48"),
    "three offsets": (_entry(data_offsets=[0, 1, 2]), "impossible shape or place"),
    "fractions": (_entry(shape=[12.0]), "impossible shape or place"),
    "truth values": (_entry(shape=[True]), "impossible shape or place"),
    "huge shape": (_entry(shape=[2**40, 2**40]), "takes"),
    "many dimensions": (_entry(shape=[1] * 100), "impossible shape or place"),
    "size against shape": (_entry(shape=[13]), "takes 52 bytes, its place has 48"),
    "wrong shape": (_entry(shape=[3, 4]), r"shape \(3, 4\); the configuration says \(12,\)"),
    "unknown dtype": (_entry(dtype="F99"), "unknown dtype 'F99'"),
    "dtype no string": (_entry(dtype=["F32"]), "unknown dtype"),
    "integers": (_entry(dtype="I32"), "weights of float32, int32"),
    "entry no object": (lambda h: h.update({"embedding_norm.bias": 3}), "not described by dtype"),
    "missing tensor": (lambda h: h.pop("embedding_norm.bias"), "leaves a gap|found .* bytes"),
    "renamed tensor": (
        lambda h: h.update({"norm.bias": h.pop("embedding_norm.bias")}),
        "lacks .embedding_norm.bias.; the file has unknown .norm.bias",
    ),
    "no metadata": (lambda h: h.pop("__metadata__"), "not a converted GPT2_ML"),
    "metadata no object": (lambda h: h.update(__metadata__=[1]), "metadata are not strings"),
    "metadata no strings": (_meta(source={}), "metadata are not strings"),
    "later version": (_meta(gpt2ml_format="2"), "format version 2; .* update gpt2ml_torch"),
    "no version": (_meta(gpt2ml_format="one"), "gpt2ml_format is 'one'"),
    "version ²": (_meta(gpt2ml_format="²"), "gpt2ml_format is '²'"),
    "no config": (lambda h: h["__metadata__"].pop("config"), "lack 'config'"),
    "config no JSON": (_meta(config="{"), "config in the metadata is not JSON"),
    "config a list": (_meta(config="[]"), "not a JSON object"),
    "config nested": (_meta(config="[" * 50_000), "not JSON"),
    "config unknown field": (_config(n_embd=3), "unknown fields .'n_embd'."),
    "10**12 layers": (_config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "other layers": (_config(num_hidden_layers=3), "lacks .blocks.2.attention.output.bias"),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads is 0"),
    "width a string": (_config(hidden_size="12"), "hidden_size is '12'"),
    "long vocabulary": (_meta(vocab="a\n" * 22), "has 22 lines, the model 21 rows"),
    "lone surrogate": (_meta(vocab="\ud800"), "not valid Unicode"),
    "source no JSON": (_meta(source="x"), "source in the metadata is not JSON"),
    "generation a list": (_meta(generation="[]"), "not a JSON object"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_a_clear_error(name: str, path: Path) -> None:
    change, expected = HOSTILE_HEADERS[name]
    path.write_bytes(_edit(path, change))
    _assert_refused(path, expected)


HOSTILE_SLOTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one missing": (
        lambda h: h.pop("optimizer.embedding_norm.bias.v"),
        "leaves a gap|found .* bytes",
    ),
    "one renamed": (
        lambda h: h.update({"optimizer.x": h.pop("optimizer.embedding_norm.bias.v")}),
        "optimizer in the file lacks .*embedding_norm.bias.v'; .* has unknown .optimizer.x",
    ),
    "wrong shape": (
        lambda h: h["optimizer.embedding_norm.bias.v"].update(shape=[3, 4]),
        r"shape \(3, 4\); the configuration says \(12,\)",
    ),
    "integers": (
        lambda h: h["optimizer.embedding_norm.bias.v"].update(dtype="I32"),
        "'optimizer.embedding_norm.bias.v' is int32; expected float32",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_SLOTS)
def test_a_hostile_optimizer_is_a_clear_error(name: str, path: Path) -> None:
    with ModelWriter(path, CONFIG, dtype="float32", slots=True, overwrite=True) as writer:
        for key, tensor in weights().items():
            writer.write(key, tensor)
        for key, (_, shape) in expected_slots(CONFIG).items():
            writer.write(key, torch.ones(shape))
    assert len(ModelFile.open(path).optimizer_state()) == len(expected_slots(CONFIG))
    change, expected = HOSTILE_SLOTS[name]
    path.write_bytes(_edit(path, change))
    _assert_refused(path, expected)


def _duplicate(path: Path) -> bytes:
    header, data = _read(path)
    text = json.dumps(header)
    return _pack((text[:-1] + ', "embedding_norm.bias": {}}').encode(), data)


DAMAGED_FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda p: b"", "is empty, not a model file: fetch it again"),
    "seven bytes": (lambda p: b"1234567", "is 7 bytes long, not a model file"),
    "truncated": (lambda p: p.read_bytes()[:-1], r"truncated: found \d+ bytes, expected \d+"),
    "truncated header": (lambda p: p.read_bytes()[:99], "the header alone ends at"),
    "longer": (lambda p: p.read_bytes() + b"x", r"found \d+ bytes, expected \d+"),
    "huge header": (lambda p: b"\xff" * 7 + b"\x7f" + p.read_bytes(), "its header would take"),
    "text": (lambda p: b"GPT2_ML weights, see elsewhere\n" * 9, "is text .*, not a model file"),
    "zip": (lambda p: b"PK\x03\x04" + bytes(100), "pickled PyTorch file"),
    "pickle": (lambda p: b"\x80\x02}q\x00." + bytes(100), "pickled PyTorch file"),
    "no JSON": (lambda p: _pack(b"{]", b""), "header is not JSON"),
    "nested": (lambda p: _pack(b'{"a":' * 50_000, b""), "header is not JSON"),
    "not UTF-8": (lambda p: _pack(b'{"\xff": 1}', b""), "header is not JSON"),
    "list": (lambda p: _pack(b"[]", b""), "header is not JSON"),
    "number": (lambda p: _pack(b'{"a": ' + b"9" * 5000 + b"}", b""), "header is not JSON"),
    "nothing in it": (lambda p: _pack(b"{}", b""), "not a converted GPT2_ML"),
    "duplicate": (_duplicate, "'embedding_norm.bias' is in the header twice"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_is_a_clear_error(name: str, path: Path) -> None:
    damage, expected = DAMAGED_FILES[name]
    path.write_bytes(damage(path))
    _assert_refused(path, expected)


def _assert_refused(path: Path, expected: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        ModelFile.open(path)
    assert re.search(expected, str(caught.value))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_foreign_model_is_called_what_it_is(tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(3, 2)}, tmp_path / "m", {"format": "pt"})
    _assert_refused(tmp_path / "m", "looks like a model of transformers or the community's")


def test_no_file_and_folders_are_clear_errors(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "nowhere", "No such file")
    _assert_refused(tmp_path, "is a folder")
    os.mkfifo(tmp_path / "pipe")
    _assert_refused(tmp_path / "pipe", "not a regular file")


def test_the_package_imports_neither_tensorflow_nor_transformers_nor_convert() -> None:
    code = (
        "import sys, pkgutil, gpt2ml_torch, gpt2ml_torch.modelfile.reader, gpt2ml_torch.model\n"
        "bad = {'tensorflow', 'transformers', 'convert', 'keras'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_does_not_read_what_is_not_used(tmp_path: Path) -> None:
    """A file of 400 MB is mapped, and converted, without the memory for it."""
    config = GPT2MLConfig(
        vocab_size=48_000,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=1024,
    )
    path = tmp_path / "large"
    zeros = {n: torch.zeros(1).expand(s) for n, s in expected_shapes(config).items()}
    save(path, zeros, config)
    code = (
        "import resource, sys, torch\n"
        "from gpt2ml_torch.modelfile import ModelFile\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak()\n"
        "mapped = ModelFile.open(sys.argv[1]).state_dict()\n"
        "print(peak() - before)\n"
        "del mapped\n"
        "converted = ModelFile.open(sys.argv[1]).state_dict(dtype=torch.bfloat16)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    mapped, converted = map(int, done.stdout.split())
    size = path.stat().st_size
    assert mapped < 30 << 20
    assert converted < size / 2 + (40 << 20)
