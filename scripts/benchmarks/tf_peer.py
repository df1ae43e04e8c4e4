"""GPT2_ML in TensorFlow, decoding with a cache, as the original code does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from convert import mapping
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.format import expected_shapes
from scripts.benchmarks.peers import PROMPT, random_ids


class TensorFlowReference:
    def __init__(self, config: GPT2MLConfig, precision: str, folder: Path) -> None:
        from scripts.tf_model import TFReference  # TensorFlow may not be installed

        weights = random_weights(config)
        reference = TFReference(weights, heads=config.num_attention_heads, dtype=precision)
        self.vocab_size = config.vocab_size
        # Not as a tf.function, which would be traced again for each length of the cache.
        self._step: Any = reference.decode

    def prefill(self, tokens: int) -> float:
        ids = random_ids(1, tokens, self.vocab_size)
        started = time.perf_counter()
        logits, _ = self._step(ids, cache=None)
        logits[:, -1].numpy()
        return time.perf_counter() - started

    def decode(self, batch: int, new_tokens: int) -> float:
        logits, cache = self._step(random_ids(batch, PROMPT, self.vocab_size), cache=None)
        started = time.perf_counter()
        for _ in range(new_tokens):
            best = np.argmax(logits[:, -1].numpy(), axis=-1)[:, None]
            logits, cache = self._step(best, cache=cache)
        return time.perf_counter() - started


def random_weights(config: GPT2MLConfig) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Weights of std 0.02 under the original's names."""
    random, shapes = np.random.default_rng(0), expected_shapes(config)
    return {
        name: random.standard_normal(recipe.source_shape(shapes[ours]), dtype=np.float32)
        * np.float32(0.02)
        for ours, recipe in mapping.recipes(config.num_hidden_layers, mapping.TENSORFLOW).items()
        for name in recipe.sources
    }
