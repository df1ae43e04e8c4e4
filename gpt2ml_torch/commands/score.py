"""`gpt2ml score MODEL [TEXT ...]`: how probable given texts are."""

from __future__ import annotations

import argparse
import json
import math
import sys

from gpt2ml_torch.commands.common import add_model_arguments, load_generator, read_lines

EXAMPLES = (
    "gpt2ml score out.safetensors 今天天气不错",
    "gpt2ml score out.safetensors --file lines.txt --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, quantize="none")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="- reads one from stdin")
    parser.add_argument("--file", metavar="FILE", help="texts, one a line")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    texts = [sys.stdin.read().rstrip("\r\n") if text == "-" else text for text in arguments.texts]
    if arguments.file is not None:
        texts += read_lines(arguments.file)
    if not texts:
        raise ValueError("no text was given; give one, or - for stdin, or --file")
    arguments.no_compile = True  # each text is read once: there is nothing to compile for
    for score in load_generator(arguments).score(texts):
        perplexity = None if math.isnan(score.perplexity) else score.perplexity
        if arguments.json:
            values = {
                "text": score.text,
                "log_likelihood": score.log_likelihood,
                "perplexity": perplexity,
                "tokens": len(score.token_ids),
            }
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(f"{score.log_likelihood:.4f}\t{score.perplexity:.4f}\t{score.text}")
    return 0
