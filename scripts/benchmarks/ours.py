"""GPT2_ML measured through the public `Generator`, as a user would call it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML, Generator, GPT2MLConfig, Tokenizer
from gpt2ml_torch.generation import Stats
from gpt2ml_torch.precision import PACKABLE
from scripts.benchmarks import weights
from scripts.benchmarks.peers import PROMPT


class GPT2MLGenerator:
    """Sampling with top-k 5; `precision` is a dtype or a quantisation."""

    def __init__(
        self,
        config: GPT2MLConfig,
        precision: str,
        folder: Path,
        *,
        device: str,
        kernels: bool = True,
        compile: bool = True,
    ) -> None:
        packed = precision in PACKABLE and device == "cpu" and kernels
        dtype = getattr(torch, precision) if precision.startswith("float") else torch.bfloat16
        path = folder / f"random-{str(dtype).removeprefix('torch.')}.safetensors"
        if not path.exists():
            weights.write_random_model(path, config, dtype)
        started = time.perf_counter()
        model = GPT2ML.from_pretrained(path, device=device, quantize=precision if packed else None)
        self.generator = Generator(
            model, Tokenizer.from_pretrained(path), compile=compile, batch_size=32, pack=packed
        )
        self.load_seconds = time.perf_counter() - started
        started = time.perf_counter()
        self._generate(1, PROMPT, 2)
        self.first_seconds = time.perf_counter() - started
        self.weight_bytes = self.generator.engine.weight_bytes

    def _generate(self, batch: int, tokens: int, new_tokens: int) -> Stats:
        stats = Stats()
        self.generator.complete(
            weights.prompt(tokens),
            stats=stats,
            num_return_sequences=batch,
            top_k=5,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            seed=0,
        )
        return stats

    def prefill(self, tokens: int) -> float:
        """Seconds from the prompt to the first new token."""
        started = time.perf_counter()
        self._generate(1, tokens, 1)
        return time.perf_counter() - started

    def decode(self, batch: int, new_tokens: int) -> float:
        """Seconds for `new_tokens` of each row, sampling and decoding to text included."""
        stats = self._generate(batch, PROMPT, new_tokens + 2)
        return stats.step_seconds / stats.steps * new_tokens


class NoCache:
    """The same model without a cache: each token reads the whole text again, as in bert4keras."""

    def __init__(self, config: GPT2MLConfig, precision: str, folder: Path) -> None:
        path = folder / f"random-{precision}.safetensors"
        if not path.exists():
            weights.write_random_model(path, config, getattr(torch, precision))
        self.model = GPT2ML.from_pretrained(path)

    @torch.inference_mode()
    def decode(self, batch: int, new_tokens: int) -> float:
        ids = torch.randint(200, self.model.config.vocab_size - 200, (batch, PROMPT))
        started = time.perf_counter()
        for _ in range(new_tokens):
            scores = self.model.logits(self.model.hidden_states(ids)[:, -1])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        return time.perf_counter() - started
