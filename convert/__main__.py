"""`python -m convert SRC OUT.safetensors`, and back with `--to-tf`."""

from __future__ import annotations

import argparse
import contextlib
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
from convert.to_safetensors import Progress
from gpt2ml_torch.commands.output import printable
from gpt2ml_torch.commands.parsing import Parser, run_command
from gpt2ml_torch.commands.program import run_program
from gpt2ml_torch.precision import INTEGER

if TYPE_CHECKING:
    from convert import to_tf

_DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLE_PROMPT = "今天天气不错"


_ONE_WAY = {  # options that converting back has no use for: their defaults
    "config": None,
    "vocab": None,
    "no_vocab": False,
    "dtype": "float32",
    "keep_optimizer": False,
    "allow_non_finite": False,
    "no_verify": False,
}

EXAMPLES = (
    "gpt2ml convert checkpoints/ out.safetensors",
    "gpt2ml convert pytorch_model.bin out.safetensors --vocab vocab.txt --dtype int8",
    "gpt2ml convert --to-tf out.safetensors folder/",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status; an error is one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="python -m convert",
        description="Convert a GPT2_ML checkpoint to one safetensors file, or back.",
        examples=[example.replace("gpt2ml", "python -m", 1) for example in EXAMPLES],
    )
    add_arguments(parser)
    return run_program(
        "convert",
        lambda: run_command(parser, words, run),
        interrupted="stopped; nothing was changed",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From what, to what, and how."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a checkpoint's folder or prefix, a PyTorch file, or with --to-tf a model file",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the file, or folder, to write")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json, in either dialect"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt")
    group.add_argument("--no-vocab", action="store_true", help="store no vocabulary")
    parser.add_argument(
        "--dtype",
        choices=[*_DTYPES, *(precision.value for precision in INTEGER)],
        default="float32",
        help="precision of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-optimizer",
        action="store_true",
        help="keep Adafactor's statistics, for fine-tuning to go on with; 0.1 %% more",
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="convert a model that holds NaN or infinity all the same",
    )
    parser.add_argument("--force", dest="overwrite", action="store_true", help="overwrite OUT")
    parser.add_argument(
        "--no-verify", action="store_true", help="accept a published size with another SHA-256"
    )
    parser.add_argument(
        "--to-tf", action="store_true", help="SRC is a safetensors file, OUT a folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert and print what was written."""
    _check(arguments)
    with warnings.catch_warnings(), _progress_bar() as progress:
        warnings.simplefilter("ignore")
        try:
            summary = _convert(arguments, progress)
        except OSError as error:
            # The system's bare words say neither what failed nor where.
            if (
                error.filename is None
                and error.errno
                and error.strerror == os.strerror(error.errno)
            ):
                text = f"while converting {arguments.source}: {error.strerror}"
                raise OSError(error.errno, text) from error
            raise
    print(printable(summary))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for options that exclude each other."""
    if arguments.keep_optimizer and arguments.dtype in INTEGER:
        raise ValueError(
            f"--keep-optimizer excludes --dtype {arguments.dtype}, which can't be tuned; leave one "
            "of them out"
        )
    if arguments.to_tf:
        for name, default in _ONE_WAY.items():
            if getattr(arguments, name) != default:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} has no meaning with --to-tf; leave it out")


def _convert(arguments: argparse.Namespace, progress: Progress) -> str:
    source, out = expanded(arguments.source), expanded(arguments.out)
    if arguments.to_tf:
        from convert.to_tf import to_tf

        report = to_tf(source, out, overwrite=arguments.overwrite, progress=progress)
        return _summary_of_tf(report)
    options = Options(
        dtype=arguments.dtype if arguments.dtype in _DTYPES else "float32",
        quantization=arguments.dtype if arguments.dtype in INTEGER else None,
        config=arguments.config and expanded(arguments.config),
        vocab=arguments.vocab and expanded(arguments.vocab),
        with_vocab=not arguments.no_vocab,
        keep_optimizer=arguments.keep_optimizer,
        verify=not arguments.no_verify,
        allow_non_finite=arguments.allow_non_finite,
        overwrite=arguments.overwrite,
    )
    converted = to_safetensors.convert(locate(source), out, options, progress=progress)
    return _summary(converted, out, arguments.dtype)


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
    return "\n".join(lines)


def _summary_of_tf(report: to_tf.Report) -> str:
    optimizer = ", with its optimizer" if report.has_optimizer else ""
    lines = [
        f"{report.prefix}: {report.parameters:,} parameters, float32, step {report.step:,}"
        f"{optimizer}",
        f"  files       {', '.join(report.files)}",
        f"  written     {report.size:,} bytes in {report.seconds:.1f} s, each tensor checksummed",
        "next: give this folder to the original code, or to python -m convert",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm  # takes a fifth of the start

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
