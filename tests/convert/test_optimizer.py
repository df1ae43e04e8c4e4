"""`--keep-optimizer`: the original's Adafactor statistics in the one file, and back again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import parameter_groups
from gpt2ml_torch.finetuning.optimizers import Adafactor
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

TENSORS = factory.with_slots(factory.tf_weights())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.write_folder(tmp_path_factory.mktemp("sound") / "ckpt", TENSORS)


@pytest.fixture(scope="module")
def kept(folder: Path) -> Path:
    out = folder.parent / "kept.safetensors"
    assert main([str(folder), str(out), "--keep-optimizer"]) == 0
    return out


def slot(name: str, kind: str) -> Tensor:
    return torch.from_numpy(np.asarray(TENSORS[f"newslm/{name}/adafactor_{kind}"]))


def test_statistics_are_kept_in_the_orientation_of_their_weights(kept: Path) -> None:
    found = ModelFile.open(kept).optimizer_state()

    def assert_is(name: str, expected: Tensor) -> None:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected), name

    embeddings = "embeddings/word_embed"
    assert_is("token_embedding.weight.vr", slot(embeddings, "vr"))
    assert_is("token_embedding.weight.vc", slot(embeddings, "vc")[None])
    assert_is("embedding_norm.bias.v", slot("embeddings/LayerNorm_embed_norm/beta", "v"))
    assert_is("blocks.2.mlp.up.weight.vr", slot("layer02/intermediate/kernel", "vc"))
    assert_is("blocks.2.mlp.up.weight.vc", slot("layer02/intermediate/kernel", "vr")[None])
    assert_is("blocks.2.mlp.up.bias.v", slot("layer02/intermediate/bias", "v"))
    parts = [f"layer01/{part}_layer" for part in ("query", "key", "value")]
    qkv = "blocks.1.attention.qkv"
    assert_is(f"{qkv}.weight.vr", torch.cat([slot(f"{part}/kernel", "vc") for part in parts]))
    assert_is(f"{qkv}.weight.vc", torch.stack([slot(f"{part}/kernel", "vr") for part in parts]))
    assert_is(f"{qkv}.bias.v", torch.cat([slot(f"{part}/bias", "v") for part in parts]))


def test_the_names_and_shapes_are_those_of_the_optimizer_that_goes_on(kept: Path) -> None:
    model = GPT2ML.from_pretrained(kept)
    optimizer = Adafactor(parameter_groups(model))
    optimizer.allocate()
    expected = {
        f"{name}.{kind}": value.shape
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }
    found = ModelFile.open(kept).optimizer_state()
    assert {name: value.shape for name, value in found.items()} == expected


def test_the_weights_are_those_of_a_file_without(kept: Path, folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(tmp_path / "plain")]) == 0
    plain, found = (ModelFile.open(path).state_dict() for path in (tmp_path / "plain", kept))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert ModelFile.open(tmp_path / "plain").optimizer_state() == {}


def test_they_are_float32_whatever_the_weights_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--keep-optimizer", "--dtype", "bfloat16"]) == 0
    assert ModelFile.open(out).dtype == "bfloat16"
    found = ModelFile.open(out).optimizer_state()
    assert torch.equal(found["blocks.0.mlp.down.bias.v"], slot("layer00/output/bias", "v"))


def test_there_and_back_is_the_identity_with_the_optimizer_too(kept: Path, tmp_path: Path) -> None:
    assert main(["--to-tf", str(kept), str(tmp_path / "back")]) == 0
    reader = tf.train.load_checkpoint(str(tmp_path / "back"))
    assert reader.get_variable_to_shape_map().keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert np.array_equal(reader.get_tensor(name), value), name
    again = tmp_path / "again.safetensors"
    assert main([str(tmp_path / "back"), str(again), "--keep-optimizer"]) == 0
    assert again.read_bytes() == kept.read_bytes()


def test_the_summary_counts_what_was_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(tmp_path / "out"), "--keep-optimizer"]) == 0
    said = capfd.readouterr().out
    slots = sum("/adafactor_" in name for name in TENSORS)
    assert f"kept: {slots} optimiser slots; dropped: 1 step counter\n" in said


Change = Callable[[dict[str, Any]], Any]
BIAS = "newslm/layer00/output/bias"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{BIAS}/adafactor_v"), f"not complete: missing tensor '{BIAS}/adaf"),
        (
            lambda t: t.update({f"{BIAS}/adafactor_v": np.zeros(63, "f4")}),
            r"not complete: .* has shape \(63,\), expected \(64,\)",
        ),
        (
            lambda t: t.update({f"{BIAS}/adafactor_v": np.zeros(64, "i8")}),
            "not complete: .* holds int64",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "/adafactor_" in name],
            "holds no optimizer state; leave out --keep-optimizer",
        ),
    ],
    ids=["one is missing", "another shape", "integers", "none"],
)
def test_statistics_that_are_not_all_there_are_an_error(
    change: Change, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors: dict[str, Any] = dict(TENSORS)
    change(tensors)
    folder = factory.write_folder(tmp_path / "ckpt", tensors)
    assert main([str(folder), str(tmp_path / "out"), "--keep-optimizer"]) == 2
    assert_one_line(capfd.readouterr().err, expected)
    assert not (tmp_path / "out").exists()
    assert main([str(folder), str(tmp_path / "out")]) == 0


def test_the_communitys_file_has_none_to_keep(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "vocab.txt", tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    state = factory.community_state_dict(factory.tf_weights())
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert main([str(tmp_path), str(tmp_path / "out"), "--keep-optimizer"]) == 2
    assert_one_line(capfd.readouterr().err, "pytorch_model.bin holds no optimizer")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "int8"], "--keep-optimizer excludes --dtype int8"),
        (["--to-tf"], "--keep-optimizer has no meaning with --to-tf"),
    ],
)
def test_it_excludes_what_can_not_be_tuned(
    arguments: list[str], expected: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(folder / "out"), "--keep-optimizer", *arguments]) == 2
    assert_one_line(capfd.readouterr().err, expected)


def assert_one_line(stderr: str, expected: str) -> None:
    assert re.search(expected, stderr)
    assert stderr.startswith("convert: ")
    assert stderr.count("\n") == 1
