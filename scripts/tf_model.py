"""GPT2_ML in plain TensorFlow ops: the reference of the tests, and a contestant of the benchmarks.

It was written independently of gpt2ml_torch, op by op after the original (imcaspar/gpt2-ml,
train/modeling.py and train/utils.py), so a misunderstanding shows unless both share it.

Shapes: B batch, T new tokens, P tokens in the cache, D width, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

Array = np.ndarray[Any, Any]

SCOPE = "newslm"
_HEADS = ("query_layer", "key_layer", "value_layer")

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

        The original divides by the count + 1e-5; a comparison with it must allow for that.
        """
        token_ids = tf.convert_to_tensor(token_ids)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        log_probs = tf.nn.log_softmax(self.logits(inputs), axis=-1)
        picked = tf.gather(log_probs, targets, batch_dims=2)  # (B, T)
        real = tf.cast(tf.not_equal(targets, 0), picked.dtype)
        return -tf.reduce_sum(picked * real) / tf.reduce_sum(real)

    def loss_and_gradients(self, token_ids: Any) -> tuple[float, dict[str, Array]]:
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

        query, key, value = (heads_of(name) for name in _HEADS)
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
