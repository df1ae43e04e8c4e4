"""Run a program: errors are one line, and the exit status follows Unix conventions."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.streams import OutputError, discard_output, standard_streams

FAILED = 2  # a wrong command line, input or environment
OUTPUT_FAILED = 1  # as coreutils
INTERRUPTED = 128 + 2  # as a shell shows SIGINT
BROKEN_PIPE = 128 + 13  # as a shell shows SIGPIPE


def run_program(
    name: str,
    work: Callable[[], int],
    *,
    context: str = "",
    interrupted: str = "",
) -> int:
    """Run `work` and give its exit status, or what an error of it means.

    `ValueError`, `OSError` and a lack of memory are printed as one line on standard error that
    begins with the program's `name`. `context` says what was being done, if the error doesn't name
    a file, and `interrupted` what Ctrl-C left behind. A closed pipe ends the program silently. All
    other exceptions are faults of the program and are raised.
    """
    with standard_streams():
        try:
            status = _run(work)
            sys.stdout.flush()
            return status
        except OutputError as error:
            discard_output()
            return _output_failed(name, error)
        except BrokenPipeError:
            discard_output()
            return BROKEN_PIPE
        except KeyboardInterrupt:
            if interrupted:
                _report(name, interrupted)
            status = INTERRUPTED
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _lacks_memory(error):
                raise
            report_error(name, error, context)
            status = FAILED
        try:
            sys.stdout.flush()
        except OSError:
            discard_output()
        return status


def report_error(name: str, error: Exception, context: str = "") -> None:
    """Print an error as one line on standard error, as `run_program` does."""
    _report(name, f"error: {describe(error, context)}")


def describe(error: Exception, context: str = "") -> str:
    """What an error says, in one line, with the file that it names."""
    if _lacks_memory(error):
        return one_line(f"out of memory: {error}" if str(error) else "out of memory")
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.errno and text == os.strerror(error.errno):  # the system's bare words
            # A file that was opened by its descriptor has a number for a name.
            named = isinstance(error.filename, (str, bytes, os.PathLike))
            place = os.fsdecode(error.filename) if named else context
            text = f"{place}: {text}" if place else text
    return one_line(text)


def _run(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else 0


def _lacks_memory(error: Exception) -> bool:
    text = str(error)
    words = ("can't allocate memory", "out of memory", "not enough memory")  # PyTorch's
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def _output_failed(name: str, error: OutputError) -> int:
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    _report(name, f"error: can't write to standard output: {error.strerror}")
    return OUTPUT_FAILED


def _report(name: str, text: str) -> None:
    print(f"{name}: {one_line(text)}", file=sys.stderr)
