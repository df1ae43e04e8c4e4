"""`python -m convert SRC OUT.safetensors`, and back with `--to-tf`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import to_safetensors
from convert.inputs import expanded, locate
from convert.plan import Options
from convert.tensors import Progress
from gpt2ml_torch.commands.output import escaped
from gpt2ml_torch.commands.parsing import Parser, add_options, given, run_command
from gpt2ml_torch.commands.paths import find_model
from gpt2ml_torch.commands.program import run_program
from gpt2ml_torch.options import OptionError, option, option_fields

if TYPE_CHECKING:
    from convert import to_tf

_EXAMPLE_PROMPT = "今天天气不错"

EXAMPLES = (
    "gpt2ml convert ckpt_dir out.safetensors",
    "gpt2ml convert pytorch_model.bin out.safetensors --vocab vocab.txt --dtype int8",
    "gpt2ml convert --to-tf out.safetensors folder/",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """The command's options: source, output and how to convert."""

    source: Path = option(
        positional=True,
        path=True,
        metavar="SRC",
        help="folder or prefix of a checkpoint, PyTorch file or exported folder; with --to-tf, a "
        "model file",
    )
    out: Path = option(
        positional=True, path=True, metavar="OUT", help="the file, or folder, to write"
    )
    to_tf: bool = option(
        False, flags="--to-tf", help="convert the model file SRC to a TensorFlow checkpoint in OUT"
    )


def main(argv: Sequence[str] | None = None, *, program: str = "python -m convert") -> int:
    """Run the command and return its exit status; an error is one line on standard error.

    `program` is the name of the command in its help and errors.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog=program,
        description="Convert a GPT2_ML checkpoint to one safetensors file, or back.",
        examples=[example.replace("gpt2ml convert", program, 1) for example in EXAMPLES],
    )
    add_arguments(parser)
    return run_program(
        "convert",
        lambda: run_command(parser, words, run),
        interrupted="stopped; nothing was changed",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add_options(parser, ConvertOptions)


def run(arguments: argparse.Namespace) -> int:
    """Convert and print what was written."""
    options = _options(arguments)
    with warnings.catch_warnings(), _progress_bar() as progress:
        warnings.simplefilter("ignore")
        try:
            summary = _convert(options, progress)
        except OSError as error:
            # The system's message alone says neither what failed nor where.
            if (
                error.filename is None
                and error.errno
                and error.strerror == os.strerror(error.errno)
            ):
                text = f"while converting {options.source}: {error.strerror}"
                raise OSError(error.errno, text) from error
            raise
    print(summary)
    return 0


def _options(arguments: argparse.Namespace) -> ConvertOptions:
    """The options of a command line; raises `OptionError` for options that exclude each other."""
    values = given(arguments, ConvertOptions)
    for name in ("source", "out", "config", "vocab"):
        if name in values:
            values[name] = expanded(Path(values[name]))
    if values.get("to_tf"):
        for field in option_fields(Options):
            kept = field.name in ("overwrite", "allow_non_finite")
            if not kept and values.get(field.name, field.default) != field.default:
                raise OptionError("{" + field.name + "} has no meaning with {to_tf}; leave it out")
    return ConvertOptions(**values)


def _convert(options: ConvertOptions, progress: Progress) -> str:
    source, out = options.source, options.out
    if options.to_tf:
        from convert.to_tf import to_tf

        report = to_tf(
            Path(find_model(str(source))),
            out,
            overwrite=options.overwrite,
            allow_non_finite=options.allow_non_finite,
            progress=progress,
        )
        return _summary_of_tf(report)
    converted = to_safetensors.convert(locate(source), out, options, progress=progress)
    return _summary(converted, out, options.dtype)


def _summary(report: to_safetensors.Report, out: Path, dtype: str) -> str:
    config, source = report.config, report.source
    what = source.get("published", "GPT2_ML")
    dropped = (
        ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "nothing"
    )
    kept = f"kept: {report.kept:,} optimiser slots; " if report.kept else ""
    vocabulary = report.vocabulary
    words = f"{vocabulary.lines:,} tokens from {vocabulary.path}" if vocabulary else "none stored"
    step = f", step {source['step']:,}" if "step" in source else ""
    lines = [
        f"{out}: {what} from {source['name']}{step}",
        f"  model       {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.vocab_size:,} embeddings",
        f"  tensors     {report.tensors:,}, {config.num_parameters:,} parameters, {dtype}; "
        f"{kept}dropped: {dropped}",
        f"  vocabulary  {words}",
        *(f"  note        {note}" for note in report.notes),
        f"  verified    {report.verified}",
        f"  written     {report.size:,} bytes in {report.seconds:.1f} s, each tensor checksummed",
        "next:",
        f"  python -m gpt2ml_torch generate {shlex.quote(str(out))} {_EXAMPLE_PROMPT}",
    ]
    return "\n".join(map(escaped, lines))  # names may hold terminal control characters


def _summary_of_tf(report: to_tf.Report) -> str:
    optimizer = ", with its optimizer" if report.has_optimizer else ""
    lines = [
        f"{report.prefix}: {report.parameters:,} parameters, float32, step {report.step:,}"
        f"{optimizer}",
        f"  files       {', '.join(report.files)}",
        f"  written     {report.size:,} bytes in {report.seconds:.1f} s, each tensor checksummed",
        "next: give this folder to the original code, or to python -m convert",
    ]
    return "\n".join(map(escaped, lines))  # names may hold terminal control characters


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm  # late: its import takes a fifth of the program's start

    bar: tqdm[Any] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="B", unit_scale=True, leave=False)
        bar.update(done)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


if __name__ == "__main__":
    sys.exit(main())
