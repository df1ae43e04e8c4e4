"""Shared by several commands: find and load a model, read texts, log to standard error."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Literal

import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer
from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.streams import read_input
from gpt2ml_torch.devices import choose_device
from gpt2ml_torch.finetuning.adapter_packing import pack_adapter
from gpt2ml_torch.finetuning.adapters import read_adapter
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.options import check_options, check_text, option
from gpt2ml_torch.precision import PACKABLE
from gpt2ml_torch.textfiles import read_text_file
from gpt2ml_torch.tokenizer.words import WordSplitter

# Far more threads than cores are only slower, and PyTorch crashes if it can't start them.
MAX_THREADS = max(16, 2 * (os.cpu_count() or 1))
PACKED = tuple(precision.value for precision in PACKABLE)

_MAX_TEXT_BYTES = 1 << 26  # 64 MiB of prompts; each becomes a text in memory

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The model to load, and how. Raises `ValueError` for values out of range."""

    model: str = option(positional=True, path=True, help="a model file, or a folder with one")
    vocab: str | None = option(
        None, path=True, metavar="FILE", help="vocabulary file, if the model file holds none"
    )
    device: str = option(
        "auto", default_text="the first GPU, or else the CPU", help="cpu, cuda, cuda:1 ..."
    )
    quantize: str = option(
        "auto",
        choices=("auto", "none", *PACKED),
        help="precision of the weights; auto is the fastest safe one",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None,
        default_text="fits the weights",
        help="precision of the activations, and of weights that are not quantised",
    )
    threads: int | None = option(
        None, low=1, high=MAX_THREADS, metavar="N", default_text="all cores", help="CPU threads"
    )
    compile: bool = option(
        True,
        flags="--no-compile",
        inverted=True,
        help="don't compile: start at once, but run slower",
    )
    batch_size: int | None = option(
        None, low=1, high=2**16, metavar="N", help="texts decoded at once"
    )
    quiet: bool = option(False, flags="--quiet", help="no progress lines")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions(LoadOptions):
    """A model that writes, and the one that may help it."""

    assistant: str | None = option(
        None,
        choices=PACKED,
        help="also load the weights in this precision as a draft model (speculative decoding)",
    )


def load_generator(
    options: LoadOptions, *, assistant: str | None = None, adapters: Mapping[str, str] | None = None
) -> Generator:
    """`adapters` are folders of LoRA adapters by name."""
    show_log(quiet=options.quiet)
    found = {name: read_adapter(folder) for name, folder in (adapters or {}).items()}
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    device = choose_device(options.device)
    with ModelFile.open(options.model) as file:
        generator = Generator.from_file(
            file,
            device=device,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            precision=None if options.quantize == "none" else options.quantize,
            compile=options.compile,
            batch_size=options.batch_size,
            tokenizer=Tokenizer.from_pretrained(options.vocab) if options.vocab else None,
            assistant=assistant,
        )
    _logger.info(
        "loaded %s (%s) in %.1f s",
        *(options.model, precision_of(generator.model), time.perf_counter() - began),
    )
    for name, adapter in found.items():
        generator.add_adapter(name, pack_adapter(adapter, generator.model))
        _logger.info("added the adapter %s", name)
    return generator


def precision_of(model: GPT2ML) -> str:
    """The precision of the weights, in words."""
    dtype = str(model.dtype).removeprefix("torch.")
    return dtype if model.packed is None else f"{model.packed}, activations {dtype}"


def read_texts(name: str, words: tuple[str, ...], file: str | None) -> list[str]:
    """The texts of the arguments called `name`, "-" being standard input, and the lines of a file.

    Raises `ValueError` for bytes that aren't UTF-8.
    """
    for word in words:
        check_text(name, word)
    texts = [read_input() if word == "-" else word for word in words]
    return texts if file is None else texts + read_lines(file)


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank, with their own spaces.

    White space is blank, and so is what the tokenizer drops: a byte order mark, a zero width space.
    """
    expected = "texts, one a line"
    text = read_text_file(path, max_bytes=_MAX_TEXT_BYTES, expected=expected, pipes=True)
    for end in ("\r\r\n", "\r\n", "\r"):  # the last is an old Mac's
        text = text.replace(end, "\n")
    splitter = WordSplitter()
    lines = [
        line.lstrip("\ufeff")
        for line in text.split("\n")
        if any(splitter.words(character) for character in line)
    ]
    if not lines:
        raise ValueError(f"{path} holds no text; expected one a line")
    return lines


class _OneLine(logging.Formatter):
    """Log lines name files and quote texts, which could steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def show_log(*, quiet: bool) -> None:
    """The package's log lines on stderr; warnings only, if quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("gpt2ml: %(message)s"))
    logger = logging.getLogger("gpt2ml_torch")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
