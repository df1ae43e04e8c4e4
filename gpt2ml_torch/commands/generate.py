"""`gpt2ml generate MODEL [PROMPT ...]`: continue texts, streamed as they come."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import Any

from gpt2ml_torch.bandwidth import read_bandwidth
from gpt2ml_torch.commands.common import WriteOptions, load_generator, read_texts
from gpt2ml_torch.commands.output import printable, write_json
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.commands.streams import read_input_line
from gpt2ml_torch.generation import GenerationConfig, Generator
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import shortened
from gpt2ml_torch.options import check_text, option

_logger = logging.getLogger(__name__)

EXAMPLES = (
    "gpt2ml generate out.safetensors 今天天气不错 --top-k 5 --stop 。 --seed 1",
    "gpt2ml generate out.safetensors --file prompts.txt -n 3 --json > texts.jsonl",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(WriteOptions):
    """Which texts to continue with which model, and what to print."""

    prompts: tuple[str, ...] = option(
        (),
        positional=True,
        metavar="PROMPT",
        help="- reads one from standard input; without any, each line of it is one",
    )
    file: str | None = option(None, path=True, metavar="FILE", help="prompts, one a line")
    adapter_folder: str | None = option(
        None,
        flags="--adapter",
        path=True,
        metavar="FOLDER",
        help="write with this LoRA adapter, added beside the packed weights",
    )
    full_text: bool = option(
        True, flags="--no-prompt", inverted=True, help="print the continuation alone"
    )
    logprobs: bool = option(False, flags="--logprobs", help="with --json: for each token")
    json: bool = option(False, flags="--json", help="one JSON object a line")
    stats: bool = option(False, flags="--stats", help="speed, on standard error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, and every field of `GenerationConfig`."""
    add_options(parser, GenerateOptions)
    add_options(parser, GenerationConfig)


def run(arguments: argparse.Namespace) -> int:
    """Print the continuations; without a prompt, of each line of standard input."""
    options = GenerateOptions(**given(arguments, GenerateOptions))
    config = given(arguments, GenerationConfig)
    GenerationConfig(**config)  # bad values are reported before the model is loaded
    prompts = read_texts("prompts", options.prompts, options.file)
    adapters = {} if options.adapter_folder is None else {"adapter": options.adapter_folder}
    generator = load_generator(options, assistant=options.assistant, adapters=adapters)
    if adapters:
        config["adapter"] = "adapter"
    stats = Stats()
    if prompts:
        _warn_of_unknown(generator, prompts)
        _write(generator, prompts, config, options, stats)
    else:
        _interact(generator, config, options, stats)
    if options.stats:
        print(_summary(generator, stats), file=sys.stderr)
    return 0


def _warn_of_unknown(generator: Generator, prompts: list[str]) -> None:
    """Warn of prompts that are all [UNK], from which no text can continue."""
    for prompt in prompts:
        ids = generator.tokenizer.encode(prompt)
        if ids and generator.tokenizer.unknown_share(ids) == 1:
            shown = shortened(prompt)
            _logger.warning("the vocabulary has nothing of the prompt %r: all is [UNK]", shown)


def _write(
    generator: Generator,
    prompts: list[str],
    config: dict[str, Any],
    options: GenerateOptions,
    stats: Stats,
) -> None:
    if options.json:
        completions = generator.complete(prompts, logprobs=options.logprobs, stats=stats, **config)
        for completion in completions:
            write_json(_given_values(dataclasses.asdict(completion)))
        return
    samples = config.get("num_return_sequences", generator.defaults.num_return_sequences)
    how: dict[str, Any] = {"return_full_text": options.full_text, "stats": stats, **config}
    if len(prompts) == 1 and samples == 1:
        pieces = generator.stream(prompts[0], **how)
        # An error comes before the second piece, and what compiles before the third: held back,
        # they leave the log's lines above the text, and no half text above an error.
        head = list(itertools.islice(pieces, 3 if generator.engine.compiled else 2))
        for piece in itertools.chain(head, pieces):
            print(printable(piece), end="", flush=True)
        print()
        return
    texts = generator.stream_many(prompts, **how)
    for text in _whole_texts(texts, len(prompts) * samples):
        print(printable(text), flush=True)


def _whole_texts(pieces: Iterator[tuple[int, str]], count: int) -> Iterator[str]:
    """The texts in order, once they are written."""
    texts = [""] * count
    for row, piece in pieces:
        texts[row] += piece
    yield from texts


def _interact(
    generator: Generator, config: dict[str, Any], options: GenerateOptions, stats: Stats
) -> None:
    """Continue one line after the other; Ctrl-C ends a text, or the program at an empty prompt.

    A line that can't be continued is reported, and the next one read.
    """
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = read_input_line()
        if not line:
            return
        prompt = line.rstrip("\r\n")
        if not prompt.strip():
            continue
        prompt = prompt.removeprefix("\ufeff")
        try:
            check_text("prompts", prompt)
            _warn_of_unknown(generator, [prompt])
            _write(generator, [prompt], config, options, stats)
        except ValueError as error:
            _logger.error("%s", error)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()


def _given_values(completion: dict[str, Any]) -> dict[str, Any]:
    """Without what was not asked for."""
    return {name: value for name, value in completion.items() if value not in (None, ())}


def _summary(generator: Generator, stats: Stats) -> str:
    parts = [f"{stats.prompt_tokens} prompt tokens in {stats.prompt_seconds:.2f} s"]
    if stats.steps:
        bandwidth = read_bandwidth(generator.model.device)
        read = generator.engine.weight_bytes * stats.steps
        if generator.assistant is not None:
            read += generator.assistant.weight_bytes * stats.assistant_steps
        achieved = read / stats.step_seconds
        if stats.assistant_steps:
            parts.append(f"{stats.step_tokens / stats.steps:.1f} tokens a step")
        parts += [
            f"{stats.step_tokens / stats.step_seconds:.1f} tokens/s",
            f"{achieved / 1e9:.1f} GB/s of weights, {achieved / bandwidth:.0%} of the memory's "
            f"{bandwidth / 1e9:.1f} GB/s",
        ]
    return "gpt2ml: " + "; ".join(parts)
