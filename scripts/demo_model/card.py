"""The model card of the demo checkpoint: a text with the run's own figures filled in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from gpt2ml_torch.config import GPT2MLConfig
from scripts.demo_model.export import Metre

TEMPLATE = Path(__file__).with_suffix(".md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured; losses are nats per character on the held-out poems."""

    config: GPT2MLConfig
    step: int
    schedule: str
    poems: int
    characters: int
    held_out_poems: int
    held_out_characters: int
    unknown_share: float
    loss: float
    loss_by_form: dict[int, float]
    clean_loss: float
    shared_lines: float
    ngram_losses: dict[int, float]
    metre: Metre
    metre_prompts: int
    samples: Sequence[tuple[str, str]]
    text_sha256: str


def write_card(path: Path, figures: Figures) -> None:
    """Write the card as Markdown."""
    config, metre = figures.config, figures.metre
    trigram = figures.ngram_losses[3]
    rows = [("this model", figures.loss)]
    rows += [(f"Kneser-Ney, order {n}", loss) for n, loss in sorted(figures.ngram_losses.items())]
    table = "\n".join(
        f"| {name} | {loss:.3f} | {loss / math.log(2):.3f} | {math.exp(loss):.1f} |"
        for name, loss in rows
    )
    path.write_text(
        TEMPLATE.read_text(encoding="utf-8").format(
            step=figures.step,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            parameters=f"{config.num_parameters:,}",
            schedule=figures.schedule,
            poems=f"{figures.poems:,}",
            characters=f"{figures.characters:,}",
            held_out_poems=f"{figures.held_out_poems:,}",
            held_out_characters=f"{figures.held_out_characters:,}",
            unknown_share=f"{figures.unknown_share:.2%}",
            loss=f"{figures.loss:.3f}",
            five=f"{figures.loss_by_form[5]:.3f}",
            seven=f"{figures.loss_by_form[7]:.3f}",
            clean=f"{figures.clean_loss:.3f}",
            shared_lines=f"{figures.shared_lines:.1%}",
            trigram=f"{trigram:.3f}",
            gain=f"{trigram - figures.loss:.2f}",
            ratio=f"{math.exp(trigram - figures.loss):.2f}",
            table=table,
            lines=f"{metre.lines:.1%}",
            couplets=f"{metre.couplets:.1%}",
            counted=f"{metre.counted:,}",
            prompts=figures.metre_prompts,
            samples="\n".join(f"- **{prompt}**{text}" for prompt, text in figures.samples),
            text_sha256=figures.text_sha256,
        ),
        encoding="utf-8",
    )
