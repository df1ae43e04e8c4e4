"""Gains and losses of tuning on another genre: the shipped Tang model on Yuan drama.

    scripts/bench genres                            # about half an hour on two cores

Each method tunes the same file on the same rows. The held-out loss on both genres, in nats a
character, is measured before and after. Writes RESULT.json and RESULT.md.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import Event, FinetuneConfig, RunStarted, finetune
from scripts.benchmarks import machine
from scripts.benchmarks.program import finish, make_parser, start
from scripts.benchmarks.shipped import (
    Shipped,
    add_arguments,
    mean_loss,
    prepare,
    unknown_share,
)

# Learning rates: the library's default, meant for a model a thousand times larger, and rates at
# which two million parameters learn. They were not tuned.
METHODS: dict[str, dict[str, Any]] = {
    "full, default rate 1e-5": {},
    "full, rate 3e-4": {"learning_rate": 3e-4},
    "lower half and embeddings frozen, rate 3e-4": {
        "learning_rate": 3e-4,
        "train_layers": "last:3",
        "freeze_embeddings": True,
    },
    "LoRA rank 16, rate 1e-3": {"lora_rank": 16, "learning_rate": 1e-3, "optimizer": "adamw"},
}

logger = logging.getLogger("bench")


def main() -> None:
    parser = make_parser("genres", __doc__, out="genres")
    add_arguments(parser)
    parser.add_argument("--epochs", type=float, default=4.0)
    options = start(parser)
    shipped = prepare(options)
    result = measure(shipped, options.epochs)
    finish(options.out, result, markdown(result))


def measure(shipped: Shipped, epochs: float) -> dict[str, Any]:
    train, held_out = shipped.yuan.write(shipped.folder)
    rows = [{"method": "before", **_losses(shipped, shipped.model)}]
    for method, settings in METHODS.items():
        out = shipped.folder / f"{method.replace(' ', '-')}.safetensors"
        config = FinetuneConfig(
            model=str(shipped.model),
            data=(str(train),),
            valid=(str(held_out),),
            out=str(out),
            cache=str(shipped.folder / "cache"),
            separator="line",
            batch_size=4,
            epochs=epochs,
            overwrite=True,
            gradient_checkpointing=False,
            **settings,
        )
        started = time.monotonic()
        events: list[Event] = []
        finetune(config, callback=events.append)
        row = {"method": method, **_losses(shipped, out)}
        row["minutes"] = round((time.monotonic() - started) / 60, 1)
        row["trainable"] = next(e.trainable for e in events if isinstance(e, RunStarted))
        rows.append(row)
        logger.info("%s", row)
    return {
        "machine": machine.describe(),
        "epochs": epochs,
        "parameters": GPT2ML.from_pretrained(shipped.model).config.num_parameters,
        "characters": {
            "yuan": sum(map(len, shipped.yuan.train)),
            "yuan held out": sum(map(len, shipped.yuan.held_out)),
            "tang held out": sum(map(len, shipped.tang.held_out)),
        },
        "unknown": {
            genre.name: round(unknown_share(shipped.model, genre.held_out), 5)
            for genre in (shipped.yuan, shipped.tang)
        },
        "rows": rows,
    }


def _losses(shipped: Shipped, model: Path) -> dict[str, Any]:
    return {
        genre.name: round(mean_loss(model, genre.held_out), 4)
        for genre in (shipped.yuan, shipped.tang)
    }


def markdown(result: dict[str, Any]) -> str:
    about, counts, unknown = result["machine"], result["characters"], result["unknown"]
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores; torch {about['torch']}. "
        f"The shipped model ({result['parameters']:,} parameters, Tang verse) tuned on "
        f"{counts['yuan']:,} characters of Yuan drama, {result['epochs']:g} epochs, the checkpoint "
        "with the lowest loss on Yuan kept. Held-out loss, nats a character, of "
        f"{counts['yuan held out']:,} characters of Yuan drama ({unknown['yuan']:.2%} [UNK]) and "
        f"{counts['tang held out']:,} of Tang verse ({unknown['tang']:.2%}). One run each.",
        "",
        "| | trained | Yuan drama | Tang verse |",
        "|---|---:|---:|---:|",
    ]
    before = result["rows"][0]
    for row in result["rows"]:
        trained = f"{row['trainable']:,}" if "trainable" in row else ""
        cells = [
            f"{row[name]:.3f}" + (f" ({row[name] - before[name]:+.3f})" if trained else "")
            for name in ("yuan", "tang")
        ]
        lines.append(f"| {row['method']} | {trained} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
