"""Why bfloat16 weights are rounded stochastically: loss curves of three kinds of weights.

    scripts/bench rounding                          # about ten minutes on two cores

The shipped model is tuned on Yuan drama at the library's small default learning rate, with the same
rows in the same order: with float32 weights, with bfloat16 weights rounded stochastically, and with
bfloat16 weights rounded to nearest, which loses most of the updates. Writes RESULT.json, RESULT.md
and RESULT.png.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning import Evaluated, Event, FinetuneConfig, finetune
from scripts.benchmarks import machine
from scripts.benchmarks.program import finish, make_parser, start
from scripts.benchmarks.shipped import Shipped, add_arguments, prepare

WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16, stochastic rounding": {"precision": "bfloat16"},
    "bfloat16, rounding to nearest": {"precision": "bfloat16", "stochastic_rounding": False},
}

logger = logging.getLogger("bench")


def main() -> None:
    parser = make_parser("rounding", __doc__, out="rounding")
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=400)
    options = start(parser)
    result = measure(prepare(options), options.steps)
    finish(options.out, result, markdown(result))
    draw(result, options.out.with_suffix(".png"))


def measure(shipped: Shipped, steps: int) -> dict[str, Any]:
    """The curve of the validation loss for each kind of weights."""
    train, held_out = shipped.yuan.write(shipped.folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, settings in WEIGHTS.items():
        logger.info("%s", name)
        curve: list[tuple[int, float]] = []
        curves[name] = curve

        def note(event: Event, curve: list[tuple[int, float]] = curve) -> None:
            if isinstance(event, Evaluated):
                curve.append((event.step, round(event.loss, 5)))
                logger.info("step %d: %.4f", *curve[-1])

        config = FinetuneConfig(
            model=str(shipped.model),
            data=(str(train),),
            valid=(str(held_out),),
            out=str(shipped.folder / "rounded.safetensors"),
            cache=str(shipped.folder / "cache"),
            separator="line",
            length=256,
            batch_size=8,
            steps=steps,
            schedule="constant",
            eval_every=max(1, steps // 10),
            overwrite=True,
            gradient_checkpointing=False,
            **settings,
        )
        finetune(config, callback=note)
    return {
        "machine": machine.describe(),
        "steps": steps,
        "learning_rate": config.learning_rate_used,
        "curves": curves,
    }


def markdown(result: dict[str, Any]) -> str:
    about, curves = result["machine"], result["curves"]
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores; torch {about['torch']}. "
        f"The shipped model tuned on Yuan drama, {result['steps']} steps of 8 rows of 256 tokens "
        f"at a constant rate of {result['learning_rate']:g}; validation loss, nats a token. "
        "One run.",
        "",
        "| step | " + " | ".join(curves) + " |",
        "|---:|" + "---:|" * len(curves),
    ]
    for points in zip(*curves.values(), strict=True):
        cells = [f"{loss:.4f}" for _, loss in points]
        lines.append(f"| {points[0][0]} | " + " | ".join(cells) + " |")
    learned = {name: curve[0][1] - curve[-1][1] for name, curve in curves.items()}
    whole, *others = learned.items()
    shares = [f"{name}: {fall / whole[1]:.0%}" for name, fall in others]
    lines += ["", f"Of what {whole[0]} weights learned: {'; '.join(shares)}."]
    return "\n".join([*lines, ""])


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = (("black", "-", 4.0, 0.35), ("#c03b2b", "-", 1.5, 1.0), ("#4a6a8a", "--", 1.5, 1.0))
    for (name, curve), (colour, line, width, alpha) in zip(
        result["curves"].items(), styles, strict=True
    ):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, line, color=colour, linewidth=width, alpha=alpha, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
