"""GPT2_ML in plain TensorFlow ops, and real TensorFlow checkpoints of it: what everything else is
held against.

Written apart from gpt2ml_torch, op by op after the original (imcaspar/gpt2-ml, train/modeling.py
and train/utils.py), so that a misunderstanding would have to be made twice to go unseen. To make a
checkpoint by hand:

    python -m tests.tf_reference OUT_DIR --layers 5 --width 96 --heads 3 --mlp 200 --vocab 211

Shapes: B batch, T new tokens, P tokens in the cache, D width, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from tests.helpers.reference import Case
from tests.helpers.tf_adafactor import TFAdafactor
from tests.helpers.weights import (
    DENSE,
    SCOPE,
    Array,
    Sizes,
    Weights,
    adafactor_slots,
    loud_weights,
)

PREFIX = "model.ckpt-100000"

# The reference is a CPU's. Said to TensorFlow, since CUDA_VISIBLE_DEVICES would hide the GPU from
# PyTorch too.
tf.config.set_visible_devices([], "GPU")


class TFReference:
    """The original's forward pass on the CPU, without dropout, in `dtype` (by default the one of
    the weights it is given).
    """

    def __init__(self, weights: Mapping[str, Any], *, heads: int, dtype: str | None = None) -> None:
        self.weights = {
            name: tf.cast(value, dtype or tf.convert_to_tensor(value).dtype)
            for name, value in weights.items()
        }
        self.heads = heads
        self.layers = sum(name.endswith("/query_layer/kernel") for name in weights)

    def logits(self, token_ids: Any) -> tf.Tensor:
        """(B, T) -> (B, T, V)."""
        return self.decode(token_ids, cache=None)[0]

    def decode(self, token_ids: Any, *, cache: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits, and the cache with the new keys and values joined on: (B, layers, 2, H, P + T,
        K).
        """
        past = 0 if cache is None else int(cache.shape[4])
        h = self._embed(tf.convert_to_tensor(token_ids), past)  # (B, T, D)
        mask = self._causal_mask(h.shape[1], past, h.dtype)
        layers = []
        for index in range(self.layers):
            scope = f"{SCOPE}/layer{index:02d}"
            layer_cache = None if cache is None else cache[:, index]
            attended, keys_values = self._attention(scope, h, mask, layer_cache)
            h = self._residual_mlp(scope, h + attended)
            layers.append(keys_values)
        table = self.weights[f"{SCOPE}/embeddings/word_embed"]
        flat = tf.matmul(tf.reshape(h, [-1, h.shape[2]]), table, transpose_b=True)
        return tf.reshape(flat, [*h.shape[:2], -1]), tf.stack(layers, axis=1)

    def loss(self, token_ids: Any) -> tf.Tensor:
        """Mean cross entropy over next tokens that are not 0, for rows (B, T + 1).

        The original divides by the count + 1e-5; the difference is left to those who compare with
        it.
        """
        token_ids = tf.convert_to_tensor(token_ids)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        log_probs = tf.nn.log_softmax(self.logits(inputs), axis=-1)
        picked = tf.gather(log_probs, targets, batch_dims=2)  # (B, T)
        real = tf.cast(tf.not_equal(targets, 0), picked.dtype)
        return -tf.reduce_sum(picked * real) / tf.reduce_sum(real)

    def loss_and_gradients(self, token_ids: Any) -> tuple[float, Weights]:
        """The loss, and its gradient for each weight under the weight's name."""
        with tf.GradientTape() as tape:
            tape.watch(list(self.weights.values()))
            loss = self.loss(token_ids)
        gradients = tape.gradient(loss, self.weights)
        dense = {name: tf.convert_to_tensor(value).numpy() for name, value in gradients.items()}
        return float(loss.numpy()), dense

    def _embed(self, token_ids: tf.Tensor, past: int) -> tf.Tensor:
        scope = f"{SCOPE}/embeddings"
        positions = tf.range(past, past + token_ids.shape[1])
        embedded = tf.gather(self.weights[f"{scope}/word_embed"], token_ids)
        embedded += tf.gather(self.weights[f"{scope}/pos_embed"], positions)[None]
        return self._layer_norm(f"{scope}/LayerNorm_embed_norm", embedded)

    @staticmethod
    def _causal_mask(new: int, past: int, dtype: tf.DType) -> tf.Tensor:
        query, key = tf.range(new)[:, None], tf.range(new + past)
        return tf.cast(query >= key - past, dtype)  # (T, P + T), 1 where a query may look

    def _attention(
        self, scope: str, h: tf.Tensor, mask: tf.Tensor, cache: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        B, T, D = h.shape

        def heads_of(name: str) -> tf.Tensor:
            projected = tf.reshape(self._dense(f"{scope}/{name}", h), [B, T, self.heads, -1])
            return tf.transpose(projected, [0, 2, 1, 3])  # (B, H, T, K)

        query, key, value = (heads_of(name) for name in DENSE[:3])
        if cache is not None:
            past_key, past_value = tf.unstack(cache, axis=1)
            key = tf.concat([past_key, key], axis=2)  # (B, H, P + T, K)
            value = tf.concat([past_value, value], axis=2)
        scores = tf.matmul(query, key, transpose_b=True) * (1 / math.sqrt(D // self.heads))
        # 1e10 is infinite in float16, and infinity * 0 is NaN: there the largest finite number must
        # do.
        far = min(1e10, float(scores.dtype.max))
        scores = scores * mask - tf.cast(far, scores.dtype) * (1 - mask)
        context = tf.transpose(tf.matmul(tf.nn.softmax(scores), value), [0, 2, 1, 3])
        context = tf.reshape(context, [B, T, D])
        return self._dense(f"{scope}/context_projection_layer", context), tf.stack([key, value], 1)

    def _residual_mlp(self, scope: str, x: tf.Tensor) -> tf.Tensor:
        normed = self._layer_norm(f"{scope}/LayerNorm_mlp_ln0", x)
        inner = self._dense(f"{scope}/intermediate", normed)
        inner = inner * (0.5 * (1 + tf.math.erf(inner / math.sqrt(2))))
        return self._layer_norm(
            f"{scope}/LayerNorm_mlp_ln1", x + self._dense(f"{scope}/output", inner)
        )

    def _dense(self, scope: str, x: tf.Tensor) -> tf.Tensor:
        kernel, bias = self.weights[f"{scope}/kernel"], self.weights[f"{scope}/bias"]
        flat = tf.matmul(tf.reshape(x, [-1, kernel.shape[0]]), kernel) + bias
        return tf.reshape(flat, [*x.shape[:-1], kernel.shape[1]])

    def _layer_norm(self, scope: str, x: tf.Tensor) -> tf.Tensor:
        mean = tf.reduce_mean(x, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axis=-1, keepdims=True)
        normed = (x - mean) * tf.math.rsqrt(variance + 1e-5)
        return normed * self.weights[f"{scope}/gamma"] + self.weights[f"{scope}/beta"]


def results(case: Case, what: str, dtype: str) -> Weights:
    """What `Case` gives out under these words, by name; low-precision logits as float32 arrays,
    which hold them exactly.
    """
    weights, ids = case.weights, case.ids
    reference = TFReference(weights, heads=case.sizes.heads, dtype=dtype)
    if what == "logits":
        wide = "float64" if dtype == "float64" else "float32"
        return {"logits": tf.cast(reference.logits(ids[:, :-1]), wide).numpy()}
    if what == "cached":
        return {"logits": _decode_stepwise(reference, ids[:, :-1])}
    loss, gradients = reference.loss_and_gradients(ids)
    if what == "gradients":
        return {"loss": np.array(loss), **gradients}
    optimizer = TFAdafactor({name: weight.astype(dtype) for name, weight in weights.items()})
    optimizer.step(gradients, 1e-2)
    return {**optimizer.weights, **optimizer.slots}


def _decode_stepwise(reference: TFReference, ids: Array) -> Array:
    """Logits through the reference's own cache: five tokens at once, then one by one."""
    logits, cache = reference.decode(ids[:, :5], cache=None)
    pieces = [logits]
    for at in range(5, ids.shape[1]):
        logits, cache = reference.decode(ids[:, at : at + 1], cache=cache)
        pieces.append(logits)
    return np.asarray(tf.concat(pieces, axis=1).numpy())


def write_checkpoint(
    folder: str | os.PathLike[str],
    sizes: Sizes,
    weights: Mapping[str, Array],
    *,
    prefix: str = PREFIX,
    slots: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder as the original's training leaves it, and return the checkpoint's prefix.

    It holds `prefix`.{index, data-00000-of-00001, meta}, the `checkpoint` state file, config.json
    and vocab.txt. `config` overrides single entries of config.json. The variables take the dtypes
    of `weights`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Array] = dict(weights)
    if slots:
        rng = np.random.default_rng(1)
        shapes = {name: weight.shape for name, weight in weights.items()}
        for name, shape in adafactor_slots(shapes):
            values[name] = rng.random(shape, dtype=np.float32)
    step = re.search(r"\d+$", prefix)
    values["global_step"] = np.array(int(step.group()) if step else 0, np.int64)
    path = _save(folder / prefix, values)
    (folder / "config.json").write_text(
        json.dumps({**original_config(sizes), **(config or {})}, indent=2)
    )
    (folder / "vocab.txt").write_bytes("".join(f"{t}\n" for t in vocabulary(sizes)).encode())
    return path


def _save(path: Path, values: Mapping[str, Array]) -> Path:
    """Through the original's own writer: reference variables in a graph, and a V2 Saver."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        initializers = [
            v1.get_variable(
                name,
                shape=value.shape,
                dtype=tf.as_dtype(value.dtype),
                initializer=v1.zeros_initializer(),
                use_resource=False,
            ).initializer
            for name, value in values.items()
        ]
        # Fed, not written into the graph as constants: the .meta file stays small.
        fed = zip((op.inputs[1] for op in initializers), values.values(), strict=True)
        session.run(initializers, dict(fed))
        saver = v1.train.Saver(write_version=v1.train.SaverDef.V2)
        return Path(saver.save(session, str(path)))


def original_config(sizes: Sizes) -> dict[str, Any]:
    """config.json in the dialect of the original repository (configs/mega.json)."""
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.014142135623731,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": sizes.positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
    }


def vocabulary(sizes: Sizes) -> list[str]:
    """A BERT vocabulary of the right size: the special tokens at their published ids where there is
    room.
    """
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    if sizes.vocab <= max(special):
        special = dict(enumerate(special.values()))
    return [special.get(index, chr(0x4E00 + index)) for index in range(sizes.vocab)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tf_reference",
        description="Write a TensorFlow checkpoint of a random GPT2_ML in the published layout.",
    )
    parser.add_argument("folder", type=Path)
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prefix", default=PREFIX)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--no-slots", dest="slots", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    if sizes.width % sizes.heads:
        parser.error(f"--width {sizes.width} is not divisible by --heads {sizes.heads}")
    weights = {
        name: tf.cast(weight, args.dtype).numpy()
        for name, weight in loud_weights(sizes, seed=args.seed).items()
    }
    path = write_checkpoint(args.folder, sizes, weights, prefix=args.prefix, slots=args.slots)
    print(path)


if __name__ == "__main__":
    main()
