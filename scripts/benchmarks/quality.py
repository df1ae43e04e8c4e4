"""Loss of quality by precision.

    scripts/bench quality                           # about five minutes on two cores

Perplexity is measured with the shipped model on held-out poems, and computed as in generation:
through a cache, and with the kernels if weights are packed. At the published size, with random
weights, the error of the logits is measured. Writes RESULT.json and RESULT.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML, GPT2MLConfig, KVCache, Tokenizer
from scripts.benchmarks import machine
from scripts.benchmarks.program import finish, make_parser, start
from scripts.benchmarks.shipped import add_arguments, prepare
from scripts.benchmarks.weights import write_random_model

# Weights and activations; weights are packed for the kernels, or plain if None.
PRECISIONS: list[tuple[str | None, str]] = [
    (None, "float32"),
    (None, "bfloat16"),
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int4", "bfloat16"),
]

logger = logging.getLogger("bench")


def main() -> None:
    parser = make_parser("quality", __doc__, out="quality")
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=128, help="read at the published size")
    options = start(parser)
    shipped = prepare(options)
    random = shipped.folder / "random-float32.safetensors"
    if not random.exists():
        write_random_model(random, GPT2MLConfig.mega(), torch.float32)
    result = {
        "machine": machine.describe(),
        "characters": sum(len(article) - 1 for article in shipped.tang.held_out),
        "tokens": options.tokens,
        "rows": measure(shipped.model, shipped.tang.held_out, random, options.tokens),
    }
    finish(options.out, result, markdown(result))


def load(path: Path, weights: str | None, activations: str) -> GPT2ML:
    return GPT2ML.from_pretrained(path, dtype=getattr(torch, activations), quantize=weights)


@torch.inference_mode()
def logits(model: GPT2ML, ids: Sequence[int]) -> Tensor:
    """The logits after each id, (T, V) float32, computed through a cache."""
    cache = KVCache(model.config, batch_size=1, length=len(ids), dtype=model.dtype)
    return model(torch.tensor([ids]), cache=cache)[0].float()


def measure(
    shipped: Path, articles: Sequence[str], random: Path, tokens: int
) -> list[dict[str, Any]]:
    """For each precision, the loss on the articles, and the logits' error at the published size."""
    ids = [Tokenizer.from_pretrained(shipped).encode(article) for article in articles]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(200, 20000, (tokens,), generator=generator).tolist()
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for weights, activations in PRECISIONS:
        loss = mean_loss(load(shipped, weights, activations), ids)
        found = logits(load(random, weights, activations), prompt)
        exact = found if exact is None else exact
        row = {
            "weights": weights or activations,
            "activations": activations,
            "kernels": weights is not None,
            "loss": loss,
            "perplexity_change": math.exp(loss - (rows[0]["loss"] if rows else loss)) - 1,
            "logits_error": float((found - exact).norm() / exact.norm()),
        }
        logger.info("%s", row)
        rows.append(row)
    return rows


def mean_loss(model: GPT2ML, articles: Sequence[Sequence[int]]) -> float:
    """The mean loss of the articles' tokens, in nats."""
    total, count = 0.0, 0
    for ids in articles:
        scores = logits(model, ids)[:-1].log_softmax(-1)
        total -= float(scores.gather(-1, torch.tensor(ids)[1:, None]).sum(dtype=torch.float64))
        count += len(ids) - 1
    return total / count


def markdown(result: dict[str, Any]) -> str:
    about = result["machine"]
    lines = [
        f"{about['date']}, {about['processor']}; torch {about['torch']}. Perplexity: the shipped "
        f"model on {result['characters']:,} held-out characters, against plain float32. Logits: "
        f"published size, random weights, {result['tokens']} tokens; norm of the difference from "
        "plain float32 over the norm.",
        "",
        "| weights | activations | runs on | loss, nats | perplexity | logits' relative error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['weights']} | {row['activations']} | "
            f"{'the kernels' if row['kernels'] else 'PyTorch'} | {row['loss']:.4f} | "
            f"{row['perplexity_change']:+.2%} | {row['logits_error']:.2g} |"
        )
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
