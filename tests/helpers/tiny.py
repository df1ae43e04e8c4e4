"""A tiny model with random weights and its vocabulary, for tests of what uses a model."""

from __future__ import annotations

import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig, Tokenizer

CHARACTERS = "今天气不错双十一科学空间，。春眠觉晓处闻啼鸟夜来风雨声花落知多少"
SPECIAL = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# With heads that the kernels support, and sizes that fill no panel or group.
KERNEL_CONFIG = GPT2MLConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=100,
    max_position_embeddings=32,
)
WORDS = ["hello", "world", "##ing", "##ed", "'", "s", "2", "3"]


def tiny_tokenizer() -> Tokenizer:
    """BERT's layout; two reserved ids at the end, as in the published 15G checkpoint."""
    tokens = [*SPECIAL, *dict.fromkeys(CHARACTERS), *WORDS]
    return Tokenizer(tokens, num_embeddings=len(tokens) + 2)


def tiny_model(
    tokenizer: Tokenizer, *, positions: int = 64, layers: int = 2, seed: int = 0
) -> GPT2ML:
    """Weights so large that the tokens' probabilities differ widely."""
    config = GPT2MLConfig(
        vocab_size=tokenizer.num_embeddings,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2ML(config).eval()


def loud_model(config: GPT2MLConfig) -> GPT2ML:
    """Norms and biases that matter too; drawn with the generator's state of the moment."""
    model = GPT2ML(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
