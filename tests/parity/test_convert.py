"""From a foreign TensorFlow checkpoint on disk to logits, through `python -m convert` and the file.

Compared: GPT2ML.from_pretrained on the converted file against scripts/tf_model.py on the weights
that the checkpoint was written from. In float64 within 1e-12, in float32 by the 2x rule against
TensorFlow's own float32 forward.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from gpt2ml_torch import GPT2ML
from tests.conftest import TFCheckpoint
from tests.helpers.parity import (
    assert_within_twice,
    largest_error,
    random_ids,
    state_dict_of,
    to_float64,
    to_torch,
)
from tests.helpers.weights import Sizes, Weights, loud_weights

tf_reference = pytest.importorskip("tests.tf_reference", reason="writes checkpoints by TensorFlow")

FOREIGN = [
    Sizes(layers=3, width=40, heads=5, mlp=72, vocab=97, positions=33),
    Sizes(layers=6, width=48, heads=3, mlp=48, vocab=161, positions=28),
    Sizes(layers=48, width=21, heads=3, mlp=40, vocab=61, positions=17),
]


def convert(source: Path, target: Path) -> None:
    """In this process, which has TensorFlow loaded already."""
    assert main([str(source), str(target)]) == 0


def assert_parity(path: Path, sizes: Sizes, weights: Weights) -> None:
    ids = random_ids(sizes, rows=3)
    exact = to_float64(
        tf_reference.TFReference(weights, heads=sizes.heads, dtype="float64").logits(ids)
    )
    with torch.no_grad():
        double = GPT2ML.from_pretrained(path, dtype=torch.float64)(to_torch(ids))
        single = GPT2ML.from_pretrained(path)(to_torch(ids))
    assert largest_error(double, exact) <= 1e-12
    theirs = tf_reference.TFReference(weights, heads=sizes.heads).logits(ids)
    assert_within_twice(single, theirs, exact, torch.float32)


@pytest.fixture(scope="module")
def converted(tf_checkpoint: TFCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "out.safetensors"
    command = [sys.executable, "-m", "convert", str(tf_checkpoint.folder), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


def test_every_weight_arrives_bit_for_bit(tf_checkpoint: TFCheckpoint, converted: Path) -> None:
    expected = state_dict_of(tf_checkpoint.weights)
    found = GPT2ML.from_pretrained(converted).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_converted_checkpoint_has_the_originals_logits(
    tf_checkpoint: TFCheckpoint, converted: Path
) -> None:
    assert_parity(converted, tf_checkpoint.sizes, tf_checkpoint.weights)


@pytest.mark.parametrize("sizes", FOREIGN, ids=str)
def test_other_sizes_have_the_originals_logits(sizes: Sizes, tmp_path: Path) -> None:
    weights = loud_weights(sizes, seed=5)
    tf_reference.write_checkpoint(tmp_path / "source", sizes, weights)
    convert(tmp_path / "source", tmp_path / "out.safetensors")
    assert_parity(tmp_path / "out.safetensors", sizes, weights)


def test_the_communitys_bin_of_the_same_weights_gives_the_same_weights(
    tf_checkpoint: TFCheckpoint, converted: Path, tmp_path: Path
) -> None:
    torch.save(community_state_dict(tf_checkpoint.weights), tmp_path / "pytorch_model.bin")
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((tf_checkpoint.folder / name).read_bytes())
    convert(tmp_path, tmp_path / "out.safetensors")
    expected = GPT2ML.from_pretrained(converted).state_dict()
    found = GPT2ML.from_pretrained(tmp_path / "out.safetensors").state_dict()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def community_state_dict(weights: Weights) -> dict[str, Tensor]:
    """The keys of the community's PyTorch conversion: Conv1D layout, buffers, a prefix, a tied
    output.
    """
    state: dict[str, Tensor] = {}

    def put(key: str, *names: str) -> None:
        state[f"transformer.{key}"] = torch.cat([to_torch(weights[n]) for n in names], dim=-1)

    embeddings = "newslm/embeddings"
    put("wte.weight", f"{embeddings}/word_embed")
    put("wpe.weight", f"{embeddings}/pos_embed")
    put("emb_norm.weight", f"{embeddings}/LayerNorm_embed_norm/gamma")
    put("emb_norm.bias", f"{embeddings}/LayerNorm_embed_norm/beta")
    positions = len(weights[f"{embeddings}/pos_embed"])
    for index in range(sum(name.endswith("/query_layer/kernel") for name in weights)):
        layer, h = f"newslm/layer{index:02d}", f"h.{index}"
        for kind, theirs in (("kernel", "weight"), ("bias", "bias")):
            qkv = (f"{layer}/{name}_layer/{kind}" for name in ("query", "key", "value"))
            put(f"{h}.attn.c_attn.{theirs}", *qkv)
            put(f"{h}.attn.c_proj.{theirs}", f"{layer}/context_projection_layer/{kind}")
            put(f"{h}.mlp.c_fc.{theirs}", f"{layer}/intermediate/{kind}")
            put(f"{h}.mlp.c_proj.{theirs}", f"{layer}/output/{kind}")
        for kind, theirs in (("gamma", "weight"), ("beta", "bias")):
            put(f"{h}.ln_1.{theirs}", f"{layer}/LayerNorm_mlp_ln0/{kind}")
            put(f"{h}.ln_2.{theirs}", f"{layer}/LayerNorm_mlp_ln1/{kind}")
        causal = torch.ones(positions, positions, dtype=torch.uint8).tril()[None, None]
        state[f"transformer.{h}.attn.bias"] = causal
        state[f"transformer.{h}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state
