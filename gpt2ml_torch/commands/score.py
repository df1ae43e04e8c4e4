"""`gpt2ml score MODEL [TEXT ...]`: the probability of given texts."""

from __future__ import annotations

import argparse
import dataclasses

from gpt2ml_torch.commands.common import PACKED, LoadOptions, load_generator, read_texts
from gpt2ml_torch.commands.output import printable, write_json
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.options import option

EXAMPLES = (
    "gpt2ml score out.safetensors 今天天气不错",
    "gpt2ml score out.safetensors --file lines.txt --json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(LoadOptions):
    """The model, the texts to score, and how."""

    quantize: str = option(
        "none",
        choices=("auto", "none", *PACKED),
        help="precision of the weights; auto is the fastest safe one, none the file's own",
    )
    texts: tuple[str, ...] = option(
        (), positional=True, metavar="TEXT", help="- reads one from standard input"
    )
    file: str | None = option(None, path=True, metavar="FILE", help="texts, one a line")
    json: bool = option(False, flags="--json", help="one JSON object a line")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the texts."""
    add_options(parser, ScoreOptions)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each text: its log-likelihood, perplexity and itself."""
    options = ScoreOptions(**given(arguments, ScoreOptions))
    texts = read_texts("texts", options.texts, options.file)
    if not texts:
        raise ValueError("no text was given; give one, or - for standard input, or --file")
    # Each text is read once, so compiling would not pay.
    generator = load_generator(dataclasses.replace(options, compile=False))
    for score in generator.score(texts):
        if options.json:
            write_json(
                {
                    "text": score.text,
                    "log_likelihood": score.log_likelihood,
                    "perplexity": score.perplexity,  # NaN for a text of one token
                    "tokens": len(score.token_ids),
                }
            )
        else:
            text = printable(score.text)
            print(f"{score.log_likelihood:.4f}\t{score.perplexity:.4f}\t{text}")
    return 0
