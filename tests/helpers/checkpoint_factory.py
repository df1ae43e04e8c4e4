"""Small checkpoints in every format that the converter reads, made from scratch for tests to
damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

LAYERS, WIDTH, HEADS, MLP, ROWS, POSITIONS, STEP = 3, 64, 4, 288, 45, 16, 70
CONFIG = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.014142135623731,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
}
VOCAB = "[PAD]\n" + "".join(f"字{i}\n" for i in range(ROWS - 1))

Arrays = dict[str, NDArray[np.generic]]


def tf_weights(*, layers: int = LAYERS, seed: int = 0) -> Arrays:
    """Random weights under the published names, all different, so that nothing can be swapped
    unseen."""
    random = np.random.default_rng(seed)

    def array(*shape: int) -> NDArray[np.generic]:
        return random.standard_normal(shape).astype(np.float32)

    weights = {
        "newslm/embeddings/word_embed": array(ROWS, WIDTH),
        "newslm/embeddings/pos_embed": array(POSITIONS, WIDTH),
        "newslm/embeddings/LayerNorm_embed_norm/gamma": array(WIDTH),
        "newslm/embeddings/LayerNorm_embed_norm/beta": array(WIDTH),
    }
    linears = {f"{part}_layer": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    linears["context_projection_layer"] = (WIDTH, WIDTH)
    linears.update(intermediate=(WIDTH, MLP), output=(MLP, WIDTH))
    for layer in range(layers):
        scope = f"newslm/layer{layer:02d}"
        for name, (inputs, outputs) in linears.items():
            weights[f"{scope}/{name}/kernel"] = array(inputs, outputs)
            weights[f"{scope}/{name}/bias"] = array(outputs)
        for name in ("LayerNorm_mlp_ln0", "LayerNorm_mlp_ln1"):
            weights[f"{scope}/{name}/gamma"] = array(WIDTH)
            weights[f"{scope}/{name}/beta"] = array(WIDTH)
    return weights


def with_slots(weights: Arrays) -> Arrays:
    """The same with the optimiser's slots, all different, and the step counter, as published."""
    random = np.random.default_rng(1)
    full: Arrays = {**weights, "global_step": np.array(STEP, np.int64)}
    for name, value in weights.items():
        slots = ("adafactor_vr", "adafactor_vc") if value.ndim == 2 else ("adafactor_v",)
        for slot, size in zip(slots, value.shape, strict=True):
            full[f"{name}/{slot}"] = random.uniform(1e-9, 1e-6, size).astype(np.float32)
    return full


def tensorflow() -> Any:
    """The package, whose import takes seconds; the test that asks for it is skipped without it."""
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed")


def write_tf(folder: Path, tensors: Mapping[str, Any], *, name: str = f"model.ckpt-{STEP}") -> Path:
    """Write a checkpoint with TensorFlow's own op; returns the prefix."""
    tf = tensorflow()
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(folder / name),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[key]) for key in names],
    )
    return folder / name


def write_shards(folder: Path, tensors: Arrays) -> Path:
    """Write a checkpoint of two data files, in place of the one in the folder."""
    tf = tensorflow()
    halves = [dict(list(tensors.items())[part::2]) for part in range(2)]
    prefix = folder / f"model.ckpt-{STEP}"
    for path in folder.glob(f"{prefix.name}.*"):
        path.unlink()
    prefixes = [write_tf(folder, half, name=f"part{i}") for i, half in enumerate(halves)]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(prefix) for prefix in prefixes],
        destination_prefix=str(prefix),
        delete_old_dirs=False,
    )
    return prefix


def write_folder(folder: Path, tensors: Mapping[str, Any] | None = None) -> Path:
    """A folder as people keep them: checkpoint, configuration, vocabulary."""
    folder.mkdir(exist_ok=True)
    write_tf(folder, with_slots(tf_weights()) if tensors is None else tensors)
    write_beside(folder)
    return folder


def write_beside(folder: Path) -> None:
    """Write the configuration and the vocabulary that belong to the weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text(VOCAB)


def community_state_dict(weights: Arrays, *, prefix: str = "transformer.") -> dict[str, Tensor]:
    """The community's PyTorch conversion, buffers and tied output layer included."""

    def of(*names: str) -> Tensor:
        return torch.from_numpy(np.concatenate([weights[name] for name in names], axis=-1))

    embeddings = "newslm/embeddings"
    state = {
        "wte.weight": of(f"{embeddings}/word_embed"),
        "wpe.weight": of(f"{embeddings}/pos_embed"),
        "emb_norm.weight": of(f"{embeddings}/LayerNorm_embed_norm/gamma"),
        "emb_norm.bias": of(f"{embeddings}/LayerNorm_embed_norm/beta"),
    }
    linears = {
        "attn.c_attn": ("query_layer", "key_layer", "value_layer"),
        "attn.c_proj": ("context_projection_layer",),
        "mlp.c_fc": ("intermediate",),
        "mlp.c_proj": ("output",),
    }
    layers = sum(name.endswith("/query_layer/bias") for name in weights)
    for layer in range(layers):
        scope = f"newslm/layer{layer:02d}"
        for key, parts in linears.items():
            state[f"h.{layer}.{key}.weight"] = of(*(f"{scope}/{part}/kernel" for part in parts))
            state[f"h.{layer}.{key}.bias"] = of(*(f"{scope}/{part}/bias" for part in parts))
        for key, norm in (("ln_1", "LayerNorm_mlp_ln0"), ("ln_2", "LayerNorm_mlp_ln1")):
            state[f"h.{layer}.{key}.weight"] = of(f"{scope}/{norm}/gamma")
            state[f"h.{layer}.{key}.bias"] = of(f"{scope}/{norm}/beta")
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state = {prefix + key: value for key, value in state.items()}
    return {**state, "lm_head.weight": state[f"{prefix}wte.weight"]}


def expected_tensors(weights: Arrays) -> dict[str, Tensor]:
    """The file's tensors by the README's table of names, written apart from the converter's."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(weights[f"newslm/{name}"]))

    def put(key: str, *names: str) -> None:
        result[f"{key}.weight"] = torch.cat([tensor(f"{name}/kernel").T for name in names])
        result[f"{key}.bias"] = torch.cat([tensor(f"{name}/bias") for name in names])

    def put_norm(key: str, name: str) -> None:
        result[f"{key}.weight"] = tensor(f"{name}/gamma")
        result[f"{key}.bias"] = tensor(f"{name}/beta")

    result = {
        "token_embedding.weight": tensor("embeddings/word_embed"),
        "position_embedding.weight": tensor("embeddings/pos_embed"),
    }
    put_norm("embedding_norm", "embeddings/LayerNorm_embed_norm")
    for layer in range(LAYERS):
        scope, key = f"layer{layer:02d}", f"blocks.{layer}"
        parts = (f"{scope}/{part}_layer" for part in ("query", "key", "value"))
        put(f"{key}.attention.qkv", *parts)
        put(f"{key}.attention.output", f"{scope}/context_projection_layer")
        put(f"{key}.mlp.up", f"{scope}/intermediate")
        put(f"{key}.mlp.down", f"{scope}/output")
        put_norm(f"{key}.mlp_norm", f"{scope}/LayerNorm_mlp_ln0")
        put_norm(f"{key}.output_norm", f"{scope}/LayerNorm_mlp_ln1")
    return result
