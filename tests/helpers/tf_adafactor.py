"""The original's optimizer in TensorFlow ops: what `gpt2ml_torch.finetuning.Adafactor` is held
against.

Written op by op after imcaspar/gpt2-ml, train/optimization_adafactor.py (AdaFactorOptimizer, with
the settings of train/train.py: no momentum, beta2 0.999, clipping at 1, decay 0.01 except for names
with LayerNorm or bias), apart from gpt2ml_torch. Left out is its hack against XLA's fusing, which
adds 1e-30 times the mean square gradient to rate and decay.
"""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from tests.helpers.weights import Array, Weights, adafactor_slots

EPSILON = 1e-30
BETA2 = 0.999


class TFAdafactor:
    """Weights under the published names, and their slots under the names that a Saver gives them.

    All is in the dtype of the weights; slots begin at zero unless given.
    """

    def __init__(self, weights: Mapping[str, Array], slots: Mapping[str, Array] | None = None):
        self.weights: Weights = dict(weights)
        self.slots: Weights = dict(slots or {})
        for name, shape in adafactor_slots({name: w.shape for name, w in weights.items()}):
            dtype = weights[name.rpartition("/")[0]].dtype
            self.slots.setdefault(name, tf.zeros(shape, dtype).numpy())

    def step(self, gradients: Mapping[str, Array], learning_rate: float) -> None:
        """One step of every variable."""
        for name, gradient in gradients.items():
            self._step(name, tf.convert_to_tensor(gradient), learning_rate)

    def _step(self, name: str, grad: tf.Tensor, learning_rate: float) -> None:
        param = tf.convert_to_tensor(self.weights[name])
        grad_squared = tf.square(grad) + EPSILON
        if len(grad.shape) == 2:
            next_vr = self._move(f"{name}/adafactor_vr", tf.reduce_mean(grad_squared, 1))
            next_vc = self._move(f"{name}/adafactor_vc", tf.reduce_mean(grad_squared, 0))
            long_term_mean = tf.reduce_mean(next_vr, -1, keepdims=True)
            r_factor = tf.math.rsqrt(next_vr / long_term_mean + EPSILON)
            c_factor = tf.math.rsqrt(next_vc + EPSILON)
            update = grad * tf.expand_dims(r_factor, -1) * tf.expand_dims(c_factor, -2)
        else:
            next_v = self._move(f"{name}/adafactor_v", grad_squared)
            update = grad * tf.math.rsqrt(next_v + EPSILON)
        rms = tf.sqrt(tf.reduce_mean(tf.square(update)))
        update /= tf.maximum(tf.ones([], rms.dtype), rms)
        if "LayerNorm" not in name and "bias" not in name:
            update += 0.01 * param
        self.weights[name] = (param - learning_rate * update).numpy()

    def _move(self, slot: str, value: tf.Tensor) -> tf.Tensor:
        moved = BETA2 * tf.convert_to_tensor(self.slots[slot]) + (1 - BETA2) * value
        self.slots[slot] = moved.numpy()
        return moved
