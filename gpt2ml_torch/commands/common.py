"""What several commands share: loading a model, and log lines on stderr."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer
from gpt2ml_torch.devices import choose_device
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.precision import PACKABLE

_logger = logging.getLogger(__name__)


def add_model_arguments(parser: argparse.ArgumentParser, *, quantize: str) -> None:
    """What says which model to load, and how; `quantize` is the default of that option."""
    parser.add_argument("model", metavar="MODEL", help="a .safetensors file made by the converter")
    parser.add_argument("--vocab", metavar="FILE", help="vocabulary, where the model holds none")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--quantize",
        choices=["auto", "none", *(precision.value for precision in PACKABLE)],
        default=quantize,
        help="precision of the weights (default: %(default)s; auto: the fastest safe one)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the activations, and of weights that are not quantised",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--no-compile", action="store_true", help="start at once, run slower")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts decoded at once")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")


def load_generator(arguments: argparse.Namespace, *, assistant: str | None = None) -> Generator:
    show_log(quiet=arguments.quiet)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads is {arguments.threads}; expected 1 or more")
        torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    device = choose_device(arguments.device)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with ModelFile.open(arguments.model) as file:
        generator = Generator.from_file(
            file,
            device=device,
            dtype=dtype,
            precision=None if arguments.quantize == "none" else arguments.quantize,
            compile=not arguments.no_compile,
            batch_size=arguments.batch_size,
            tokenizer=Tokenizer.from_pretrained(arguments.vocab) if arguments.vocab else None,
            assistant=assistant,
        )
    _logger.info(
        "loaded %s (%s) in %.1f s",
        *(arguments.model, precision_of(generator.model), time.perf_counter() - began),
    )
    return generator


def precision_of(model: GPT2ML) -> str:
    """The precision of the weights, in words."""
    dtype = str(model.dtype).removeprefix("torch.")
    return dtype if model.packed is None else f"{model.packed}, activations {dtype}"


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank, with their own spaces."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no text; expected one a line")
    return lines


def show_log(*, quiet: bool) -> None:
    """The package's log lines on stderr; warnings only, if quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("gpt2ml: %(message)s"))
    logger = logging.getLogger("gpt2ml_torch")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
