"""`gpt2ml generate MODEL [PROMPT ...]`: continue texts, streamed as they come."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

from gpt2ml_torch.commands.common import add_model_arguments, load_generator, read_lines
from gpt2ml_torch.generation import GenerationConfig, Generator
from gpt2ml_torch.generation.stats import Stats, read_bandwidth
from gpt2ml_torch.precision import PACKABLE

_OPTIONS = {  # flag: (field of GenerationConfig, type, help)
    "--max-new-tokens": ("max_new_tokens", int, "tokens to write at most (default 256)"),
    "--min-new-tokens": ("min_new_tokens", int, "an end before this many does not count"),
    "--temperature": ("temperature", float, "0: always the most probable token"),
    "--top-k": ("top_k", int, "draw from the K most probable tokens"),
    "--top-p": ("top_p", float, "draw from the most probable tokens that sum to P"),
    "--min-p": ("min_p", float, "... that are at least P times as probable as the best"),
    "--typical-p": ("typical_p", float, "locally typical sampling"),
    "--seed": ("seed", int, "the same seed writes the same text"),
    "--repetition-penalty": ("repetition_penalty", float, "above 1: repeat less"),
    "--no-repeat-ngram-size": ("no_repeat_ngram_size", int, "never repeat N tokens in a row"),
    "--num-beams": ("num_beams", int, "beam search instead of sampling"),
    "--length-penalty": ("length_penalty", float, "beam search: above 0 prefers longer texts"),
    "--forced-start": ("forced_start", str, "text that the continuation starts with"),
    "--forced-end": ("forced_end", str, "text at the end where the maximum length is reached"),
    "--window-keep": ("window_keep", int, "tokens kept when the model's window slides on"),
    "--prompt-lookup": ("prompt_lookup_num_tokens", int, "guess N tokens from earlier text"),
    "--assistant-tokens": ("num_assistant_tokens", int, "tokens guessed at once (default 3)"),
}
_LISTS = {
    "--stop": ("stop", str, "end the text after this string (repeatable)"),
    "--ban": ("bad_words", str, "never write this string (repeatable)"),
    "--ban-id": ("suppress_tokens", int, "never write this token id (repeatable)"),
    "--allow-id": ("allow_tokens", int, "allow a special or reserved id (repeatable)"),
    "--end-id": ("eos_token_id", int, "end the text at this token id (repeatable)"),
}


EXAMPLES = (
    "gpt2ml generate out.safetensors 今天天气不错 --top-k 5 --stop 。 --seed 1",
    "gpt2ml generate out.safetensors --file prompts.txt -n 3 --json > texts.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, quantize="auto")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="- reads one from stdin; none: interactive"
    )
    parser.add_argument("--file", metavar="FILE", help="prompts, one a line")
    parser.add_argument("-n", type=int, dest="num_return_sequences", help="texts for each prompt")
    for flag, (field, kind, text) in _OPTIONS.items():
        parser.add_argument(flag, dest=field, type=kind, help=text)
    for flag, (field, kind, text) in _LISTS.items():
        parser.add_argument(flag, dest=field, type=kind, action="append", help=text)
    parser.add_argument(
        "--assistant",
        choices=[precision.value for precision in PACKABLE],
        help="also load the weights so, to guess with: a single text comes sooner",
    )
    parser.add_argument("--greedy", action="store_true", help="always the most probable token")
    parser.add_argument("--top-p-rule", choices=["huggingface", "grover"])
    parser.add_argument("--on-long-prompt", choices=["cut", "error"])
    parser.add_argument("--no-prompt", action="store_true", help="print the continuation alone")
    parser.add_argument("--logprobs", action="store_true", help="with --json: for each token")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--stats", action="store_true", help="speed, on stderr")


def run(arguments: argparse.Namespace) -> int:
    options = _given_options(arguments)
    GenerationConfig(**options)  # bad values are reported before the model is loaded
    prompts = _prompts(arguments)
    generator = load_generator(arguments, assistant=arguments.assistant)
    stats = Stats()
    if prompts:
        _write(generator, prompts, options, arguments, stats)
    else:
        _interact(generator, options, arguments, stats)
    if arguments.stats:
        print(_summary(generator, stats), file=sys.stderr)
    return 0


def _given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in fields}
    options = {name: value for name, value in values.items() if value is not None}
    if arguments.greedy:
        options["do_sample"] = False
    return options


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = [
        sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt for prompt in arguments.prompts
    ]
    if arguments.file is not None:
        prompts += read_lines(arguments.file)
    return prompts


def _write(
    generator: Generator,
    prompts: list[str],
    options: dict[str, Any],
    arguments: argparse.Namespace,
    stats: Stats,
) -> None:
    if arguments.json:
        completions = generator.complete(
            prompts, logprobs=arguments.logprobs, stats=stats, **options
        )
        for completion in completions:
            print(json.dumps(_as_json(dataclasses.asdict(completion)), ensure_ascii=False))
        return
    with_prompt = not arguments.no_prompt
    samples = options.get("num_return_sequences", generator.defaults.num_return_sequences)
    if len(prompts) == 1 and samples == 1:
        pieces = generator.stream(prompts[0], return_full_text=with_prompt, stats=stats, **options)
        # What compiles does so before the third piece: hold two back, and the log's lines stand
        # above the text instead of inside it.
        head = list(itertools.islice(pieces, 3)) if generator.engine.compiled else []
        for piece in itertools.chain(head, pieces):
            print(piece, end="", flush=True)
        print()
        return
    texts = generator.stream_many(prompts, return_full_text=with_prompt, stats=stats, **options)
    for text in _whole_texts(texts, len(prompts) * samples):
        print(text, flush=True)


def _whole_texts(pieces: Iterator[tuple[int, str]], count: int) -> Iterator[str]:
    """The texts in order, once they are written."""
    texts = [""] * count
    for row, piece in pieces:
        texts[row] += piece
    yield from texts


def _interact(
    generator: Generator, options: dict[str, Any], arguments: argparse.Namespace, stats: Stats
) -> None:
    """Continue one line after the other; Ctrl-C ends a text, or the program at an empty prompt."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.rstrip("\r\n")
        if not prompt.strip():
            continue
        try:
            _write(generator, [prompt], options, arguments, stats)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()


def _as_json(completion: dict[str, Any]) -> dict[str, Any]:
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
