"""Speed-up of speculative decoding with a cheaper draft model.

    scripts/bench assistant                         # about ten minutes on two cores

The number of tokens a step depends on the quality of the drafts, so it is measured with a trained
model: the shipped one, on held-out poems. The time of a step depends on the size, so it is measured
at the published size with random weights. Their quotient is the expected speed of a trained model.
Writes RESULT.json and RESULT.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import GPT2ML, Generator, GPT2MLConfig, Tokenizer
from gpt2ml_torch.bandwidth import read_bandwidth
from gpt2ml_torch.generation import Stats
from scripts.benchmarks import machine
from scripts.benchmarks.program import finish, make_parser, start
from scripts.benchmarks.shipped import add_arguments, prepare
from scripts.benchmarks.weights import prompt, write_random_model

PRECISIONS = ("float32", "bfloat16", "int8")
ASSISTANT = "int4"
CHOICES: dict[str, dict[str, Any]] = {  # how tokens are chosen
    "greedy": {"do_sample": False},
    "top-k 5": {"top_k": 5, "seed": 1},
    "any": {"seed": 1},
}
POEMS, POEM_TOKENS = 40, 60
PROMPT, STEPS = 128, 24

logger = logging.getLogger("bench")


def main() -> None:
    parser = make_parser("assistant", __doc__, out="assistant")
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guesses", type=int, nargs="+", default=[3, 5, 7])
    options = start(parser)
    shipped = prepare(options)
    random = shipped.folder / "random-bfloat16.safetensors"
    if not random.exists():
        write_random_model(random, GPT2MLConfig.mega(), torch.bfloat16)
    poems = shipped.tang.held_out
    poems = poems[:: max(1, len(poems) // POEMS)]
    result = {
        "machine": machine.describe(),
        "read_bandwidth": read_bandwidth(),
        "rows": [
            row
            for precision in PRECISIONS
            for row in measure(shipped.model, poems, random, precision, options)
        ],
        "fewer_layers": fewer_layers(shipped.model, poems),
    }
    finish(options.out, result, markdown(result))


def measure(
    shipped: Path,
    poems: Sequence[str],
    random: Path,
    precision: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measure one precision with each number of drafted tokens; 0 is plain decoding."""
    small, large = (
        Generator.from_pretrained(path, quantize=precision, assistant=ASSISTANT)
        for path in (shipped, random)
    )
    numbers = [0, *options.guesses]
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(options.repeats):
        for number in numbers:
            seconds[number].append(seconds_a_step(large, number))
    rows = []
    for number in numbers:
        row: dict[str, Any] = {"precision": precision, "guesses": number}
        row["seconds"] = statistics.median(seconds[number])
        row["tokens"] = {name: tokens_a_step(small, poems, name, number) for name in CHOICES}
        logger.info("%s", row)
        rows.append(row)
    return rows


def tokens_a_step(generator: Generator, poems: Sequence[str], choice: str, guesses: int) -> float:
    """Mean number of tokens that a step adds to the poems."""
    stats = Stats()
    for poem in poems:
        generator.complete(
            poem[:5],
            stats=stats,
            max_new_tokens=POEM_TOKENS,
            num_assistant_tokens=guesses,
            **CHOICES[choice],
        )
    return stats.step_tokens / stats.steps


def seconds_a_step(generator: Generator, guesses: int) -> float:
    """Seconds of a step, drafting and checking; random drafts are wrong, so it adds one token."""
    stats = Stats()
    generator.complete(
        prompt(PROMPT),
        stats=stats,
        max_new_tokens=STEPS,
        num_assistant_tokens=guesses,
        **CHOICES["top-k 5"],
    )
    return stats.step_seconds / stats.steps


def fewer_layers(shipped: Path, poems: Sequence[str]) -> dict[str, float]:
    """Tokens a step with the model's own first layers as the assistant, at top-k 5 and 3 drafts."""
    model, tokenizer = _load(shipped), Tokenizer.from_pretrained(shipped)
    return {
        name: tokens_a_step(Generator(model, tokenizer, assistant=first), poems, "top-k 5", 3)
        for name, first in _first_layers(shipped)
    }


def _load(path: Path) -> GPT2ML:
    return GPT2ML.from_pretrained(path, dtype=torch.bfloat16, quantize="bfloat16")


def _first_layers(shipped: Path) -> Iterator[tuple[str, GPT2ML]]:
    layers = len(_load(shipped).blocks)
    for kept in (layers // 2, layers - 1):
        model = _load(shipped)
        del model.blocks[kept:]
        model.config = dataclasses.replace(model.config, num_hidden_layers=kept)
        yield f"first {kept} of {layers} layers", model


def markdown(result: dict[str, Any]) -> str:
    about = result["machine"]
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores; torch {about['torch']}; "
        f"read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s. The assistant is the same "
        f"model in {ASSISTANT}. Tokens a step: the shipped model, {POEMS} held-out poems. Seconds "
        f"a step, guesses included: published size, random weights, prompts of {PROMPT} tokens, "
        "medians. Tokens/s: one through the other, at top-k 5; the ratio is to plain decoding.",
        "",
        f"| weights | guesses | {' | '.join(f'tokens a step, {name}' for name in CHOICES)} "
        "| s a step | tokens/s | ratio |",
        "|---|---:|" + "---:|" * (len(CHOICES) + 3),
    ]
    for row in result["rows"]:
        speed = row["tokens"]["top-k 5"] / row["seconds"]
        if row["guesses"] == 0:
            plain = speed
        tokens = " | ".join(f"{row['tokens'][name]:.2f}" for name in CHOICES)
        lines.append(
            f"| {row['precision']} | {row['guesses'] or 'none'} | {tokens} | {row['seconds']:.3f} "
            f"| {speed:.1f} | {speed / plain:.2f} |"
        )
    layers = "; ".join(f"{name}: {found:.2f}" for name, found in result["fewer_layers"].items())
    lines += [
        "",
        f"The model's own first layers as the assistant, 3 guesses, top-k 5, tokens a step: "
        f"{layers}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
