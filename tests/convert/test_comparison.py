"""A model file against the checkpoint that it came from: what `differing_tensors` names."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.__main__ import main as convert
from convert.comparison import differing_tensors
from convert.inputs import locate
from gpt2ml_torch import GPT2ML
from gpt2ml_torch.__main__ import main as gpt2ml
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


def write_bin(folder: Path, weights: factory.Arrays) -> Path:
    """The community's conversion; without a configuration, for shapes that it would contradict."""
    folder.mkdir(exist_ok=True)
    torch.save(factory.community_state_dict(weights), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bin(tmp_path_factory.mktemp("sound") / "checkpoint", factory.tf_weights())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def run(source: Path, out: Path, *options: str) -> None:
    assert convert([str(source), str(out), "--no-vocab", *options]) == 0


def differing(path: Path, source: Path) -> list[str]:
    with ModelFile.open(path) as file:
        return differing_tensors(file, locate(source))


def flip(path: Path, name: str, byte: int = -1) -> None:
    """Change one bit of a tensor in a file: of its last byte, or another."""
    with ModelFile.open(path) as file:
        info = file.tensors[name]
    data = bytearray(path.read_bytes())
    data[(info.end if byte < 0 else info.start) + byte] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_only_a_tensor_with_another_bit_differs(dtype: str, checkpoint: Path, out: Path) -> None:
    run(checkpoint, out, "--dtype", dtype)
    assert differing(out, checkpoint) == []
    names = ["blocks.1.mlp.up.weight", "blocks.2.mlp_norm.bias", "token_embedding.weight"]
    names += ["blocks.0.attention.qkv.weight_scale"] if dtype.startswith("int") else []
    for name in names:
        flip(out, name)
    assert differing(out, checkpoint) == sorted(names)


@pytest.mark.parametrize("byte", [0, 600_000, -1])
def test_a_tensor_is_compared_to_its_end(byte: int, shipped_model: Path, out: Path) -> None:
    """This one has 2.4 MB, which are compared in pieces."""
    out.write_bytes(shipped_model.read_bytes())
    flip(out, "token_embedding.weight", byte)
    assert differing(out, DEMO) == ["token_embedding.weight"]


def test_a_file_packed_from_a_rounded_one_is_the_checkpoints(checkpoint: Path, out: Path) -> None:
    run(checkpoint, out, "--dtype", "bfloat16")
    packed = out.with_name("packed.safetensors")
    assert gpt2ml(["quantize", str(out), "--to", "int8", "--out", str(packed)]) == 0
    with ModelFile.open(packed) as file:
        assert file.dtype == "bfloat16"
    assert differing(packed, checkpoint) == []


def test_a_wider_file_is_the_checkpoints(checkpoint: Path, out: Path) -> None:
    run(checkpoint, out)
    GPT2ML.from_pretrained(out).double().save_pretrained(out)
    assert differing(out, checkpoint) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_are_compared_by_their_bits(
    dtype: str, tmp_path: Path, out: Path
) -> None:
    weights = factory.tf_weights()
    weights["newslm/layer01/output/bias"][3:] = np.nan
    weights["newslm/embeddings/word_embed"][7, 5] = np.inf
    source = write_bin(tmp_path / "checkpoint", weights)
    run(source, out, "--dtype", dtype, "--allow-non-finite")
    assert differing(out, source) == []
    flip(out, "blocks.1.mlp.down.bias", -2 if dtype == "bfloat16" else -4)  # still no number
    assert differing(out, source) == ["blocks.1.mlp.down.bias"]


@pytest.mark.parametrize(
    ("dtype", "value"), [("int8", np.nan), ("int4", np.inf), ("float16", 1e5), ("float32", 1e5)]
)
def test_what_the_precision_can_not_hold_differs(
    dtype: str, value: float, checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    run(checkpoint, out, "--dtype", dtype)
    weights = factory.tf_weights()
    weights["newslm/layer01/key_layer/kernel"][4, 4] = value
    other = write_bin(tmp_path / "other", weights)
    assert differing(out, other)[:1] == ["blocks.1.attention.qkv.weight"]
    assert len(differing(out, other)) <= 2  # and maybe its scale


def fewer_layers(weights: factory.Arrays) -> None:
    for name in [name for name in weights if name.startswith("newslm/layer02/")]:
        del weights[name]


def more_rows(weights: factory.Arrays) -> None:
    rows = weights["newslm/embeddings/word_embed"]
    weights["newslm/embeddings/word_embed"] = np.concatenate([rows, rows[:2]])


def fewer_positions(weights: factory.Arrays) -> None:
    weights["newslm/embeddings/pos_embed"] = weights["newslm/embeddings/pos_embed"][:-1]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (fewer_layers, "blocks.2."),
        (more_rows, "token_embedding.weight"),
        (fewer_positions, "position_embedding.weight"),
    ],
)
def test_tensors_in_one_of_both_or_of_another_shape_differ(
    change: Callable[[factory.Arrays], Any],
    names: str,
    dtype: str,
    checkpoint: Path,
    tmp_path: Path,
    out: Path,
) -> None:
    weights = factory.tf_weights()
    change(weights)
    other = write_bin(tmp_path / "other", weights)
    run(checkpoint, out, "--dtype", dtype)
    with ModelFile.open(out) as file:
        changed = sorted(name for name in file.tensors if name.startswith(names))
    assert differing(out, other) == changed
    there = tmp_path / "there.safetensors"
    run(other, there, "--dtype", dtype)
    assert differing(there, checkpoint) == changed


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"config.json": '{"hidden_size": 128, "num_hidden_layers": 7}'},
        {"a.json": json.dumps(factory.CONFIG), "b.json": json.dumps(factory.CONFIG)},
    ],
    ids=["none", "another model's", "several"],
)
def test_a_configuration_given_by_hand_is_not_needed_again(
    beside: dict[str, str], tmp_path: Path, out: Path
) -> None:
    """Of a width from which the number of heads doesn't follow."""
    weights = narrowed(factory.tf_weights(), 60)
    source = write_bin(tmp_path / "checkpoint", weights)
    for name, text in beside.items():
        (source / name).write_text(text)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**factory.CONFIG, "hidden_size": 60}))
    run(source, out, "--config", str(config))
    assert differing(out, source) == []


def narrowed(weights: factory.Arrays, width: int) -> factory.Arrays:
    """The same weights cut to another width."""
    return {
        name: value[tuple(slice(width) if n == factory.WIDTH else slice(n) for n in value.shape)]
        for name, value in weights.items()
    }


def test_statistics_that_the_checkpoint_lacks_differ(checkpoint: Path, out: Path) -> None:
    run(DEMO, out, "--keep-optimizer")
    assert differing(out, DEMO) == []
    with ModelFile.open(out) as file:
        statistics = sorted(file.slots)
        torch.save(dict(file.state_dict()), checkpoint.with_name("ours.bin"))
    assert differing(out, checkpoint.with_name("ours.bin")) == statistics


def test_nothing_is_written_and_no_model_is_held_in_memory(shipped_model: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits the size of files, on Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    differing(shipped_model, DEMO)  # imports write bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    tracemalloc.start()
    try:
        assert differing(shipped_model, DEMO) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert peak < shipped_model.stat().st_size / 2
