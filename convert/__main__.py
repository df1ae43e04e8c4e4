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
from gpt2ml_torch.precision import INTEGER

if TYPE_CHECKING:
    from convert import to_tf

_DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLE_PROMPT = "今天天气不错"


class _Parser(argparse.ArgumentParser):
    """argparse's errors take several lines; ours are one."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"convert: {message}; see python -m convert --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 for success, 2 for an error, told in one line on stderr."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    warnings.simplefilter("ignore")
    try:
        with _progress_bar() as progress:
            print(_run(options, progress))
    except KeyboardInterrupt:
        return _fail("stopped; nothing was changed", status=130)
    except MemoryError:
        return _fail("out of memory")
    except (ValueError, OSError) as error:
        return _fail(_one_line(error, options.source))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m convert",
        description="Convert a GPT2_ML checkpoint to one safetensors file, or back.",
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json, in either dialect"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt")
    group.add_argument("--no-vocab", action="store_true", help="store no vocabulary")
    parser.add_argument(
        "--dtype",
        choices=[*_DTYPES, *INTEGER],
        default="float32",
        help="default: %(default)s",
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
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument(
        "--no-verify", action="store_true", help="accept a published size with another SHA-256"
    )
    parser.add_argument(
        "--to-tf", action="store_true", help="SRC is a safetensors file, OUT a folder"
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error for options that exclude each other."""
    if options.keep_optimizer and options.dtype in INTEGER:
        parser.error(f"--keep-optimizer excludes --dtype {options.dtype}, which can't be tuned")
    if options.to_tf:
        one_way = (
            "config", "vocab", "no_vocab", "keep_optimizer", "no_verify", "dtype",
            "allow_non_finite",
        )  # fmt: skip
        for name in one_way:
            if getattr(options, name) != parser.get_default(name):
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} has no meaning with --to-tf")


def _run(arguments: argparse.Namespace, progress: Progress) -> str:
    source, out = expanded(arguments.source), expanded(arguments.out)
    if arguments.to_tf:
        from convert.to_tf import to_tf

        report = to_tf(source, out, overwrite=arguments.force, progress=progress)
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
        overwrite=arguments.force,
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
        f"  written     {report.size:,} bytes in {report.seconds:.1f} s",
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


def _one_line(error: ValueError | OSError, source: Path) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.errno and text == os.strerror(error.errno):  # the system's bare words
            text = f"{error.filename or source}: {text}"
    if isinstance(error, FileExistsError):
        text += "; --force overwrites it"
    printable = (c if c.isprintable() else "?" for c in " ".join(text.split()))
    return "".join(printable)  # names in files from strangers could steer a terminal


def _fail(message: str, *, status: int = 2) -> int:
    print(f"convert: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
