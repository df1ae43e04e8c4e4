"""The TensorFlow reference of the tests, decoding with its cache: what the original code does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt2ml_torch.config import GPT2MLConfig
from scripts.benchmarks.peers import PROMPT, random_ids


class TensorFlowReference:
    def __init__(self, config: GPT2MLConfig, precision: str, folder: Path) -> None:

        from tests.helpers.weights import Sizes, weight_shapes
        from tests.tf_reference import TFReference

        sizes = Sizes(
            vocab=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            positions=config.max_position_embeddings,
        )
        random = np.random.default_rng(0)
        drawn = {
            name: random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            for name, shape in weight_shapes(sizes).items()
        }
        self.reference = TFReference(drawn, heads=sizes.heads)
        self.vocab_size = config.vocab_size
        self._step: Any = (
            self.reference.decode
        )  # one graph a length would trace again for each token

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
