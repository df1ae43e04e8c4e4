"""Models of the published sizes with random weights, written when a contestant needs them."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile import ModelWriter
from gpt2ml_torch.modelfile.format import expected_shapes

SIZES = {"base": GPT2MLConfig.base, "large": GPT2MLConfig.large, "mega": GPT2MLConfig.mega}


def vocabulary(config: GPT2MLConfig) -> list[str]:
    """A BERT-like vocabulary in which every Chinese character is one token."""
    head = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(0x4E00, 0x9FA6)]
    return (head + ["，", "。"] + characters + [f"[unused{i}]" for i in range(100, 400)])[
        : config.vocab_size - 2
    ]


def prompt(tokens: int) -> str:
    """A text of exactly `tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0x4E00, 0x8000, (tokens,), generator=generator)
    return "".join(chr(int(code)) for code in codes)


def write_random_model(path: Path, config: GPT2MLConfig, dtype: torch.dtype) -> None:
    """Write a model file; matrices are drawn with std 0.02, norm weights are 1 and biases 0."""
    generator = torch.Generator().manual_seed(0)
    with ModelWriter(
        path, config, dtype=dtype, vocab="\n".join(vocabulary(config)) + "\n", overwrite=True
    ) as writer:
        for name, shape in expected_shapes(config).items():
            if "norm.weight" in name:
                tensor = torch.ones(shape)
            elif name.endswith("bias"):
                tensor = torch.zeros(shape)
            else:
                tensor = torch.empty(shape).normal_(std=0.02, generator=generator)
            writer.write_weight(name, tensor.to(dtype))
