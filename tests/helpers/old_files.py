"""What the model files under tests/fixtures/v0.1.0 hold: weights by a formula, one vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "v0.1.0"
CONFIG = GPT2MLConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
VOCAB = "\n".join(
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"春眠不觉晓处闻啼鸟夜来风雨声", "a"]
)
SOURCE = {"name": "fixture", "step": 3}
GENERATION = {"top_k": 5}


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Loud numbers, different in each tensor, the same on every machine: thousandths."""
    count = torch.Size(shape).numel()
    seed = sum(name.encode())
    values = [((index * 7919 + seed * 104729) % 4001 - 2000) / 1000 for index in range(count)]
    return torch.tensor(values).view(shape)
