"""Run the tests marked cuda and measure a random model on the device, within a time limit.

Results are written before the tests and after every measurement, so a run that is cut off loses
only the last one. A measurement that fails, or whose program is not installed, becomes a row that
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch import GPT2ML, Generator, GPT2MLConfig, Tokenizer, kernels
from gpt2ml_torch.bandwidth import read_bandwidth
from gpt2ml_torch.devices import choose_device
from gpt2ml_torch.finetuning import Objective, estimate_memory, next_token_rows
from gpt2ml_torch.finetuning.components import make_optimizer, prepare_model, weight_dtype
from gpt2ml_torch.finetuning.step import Stepper
from gpt2ml_torch.generation import Stats
from gpt2ml_torch.modelfile.pretrained import activation_dtype
from gpt2ml_torch.precision import Precision
from scripts.benchmarks import weights
from scripts.benchmarks.gpu_report import Report, Row
from scripts.benchmarks.peers import PROMPT, TransformersGPT2
from scripts.benchmarks.program import ROOT
from scripts.benchmarks.tuning_contestant import settings_of

TINY = GPT2MLConfig(
    vocab_size=600,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    intermediate_size=128,
    max_position_embeddings=256,
)
SIZES: dict[str, Callable[[], GPT2MLConfig]] = {"tiny": lambda: TINY, **weights.SIZES}
GRACE = 15  # seconds after the limit for a measurement that has begun
SHORTEST = 100  # seconds; the least limit, since starting may take so long on a busy machine


class CutOff(BaseException):
    """A signal or the time limit ends the run; not caught by handlers of `Exception`."""


def main(arguments: list[str] | None = None) -> int:
    """Run everything; returns 1 if a test failed, 124 if the time ran out, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--seconds", type=float, default=505, help="start no measurement later")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    options = parser.parse_args(arguments)
    try:
        options.device = str(choose_device(options.device))
    except ValueError as error:
        parser.error(f"{error}; --device cpu tries the program out")
    report = Report(options.out, options.device, options.size)
    status = 0
    try:
        with _cut_off_after(max(options.seconds + GRACE, SHORTEST)):
            report.write()  # a first table, before anything can fail
            _run(options, report)
        report.state = "complete"
    except CutOff as reason:
        report.state = f"cut off: {reason}"
        status = 124 if signal.SIGTERM.name not in str(reason) else 128 + signal.SIGTERM
    report.write()
    print(report.table())
    failed = report.tests is not None and report.tests["status"] not in (0, None)
    return status or int(failed)


def _run(options: argparse.Namespace, report: Report) -> None:
    ends = time.monotonic() + options.seconds
    if options.device.startswith("cuda"):
        report.tests = {"status": None, "tail": ["cut off while they ran"]}
        report.write()
        report.tests = _run_tests(options.seconds / 2)
    for row in _measurements(options, ends):
        report.add(row)


@contextlib.contextmanager
def _cut_off_after(seconds: float) -> Iterator[None]:
    """Raise `CutOff` after `seconds` (where the system has SIGALRM) and on SIGTERM."""

    def cut_off(number: int, _frame: Any) -> None:
        reason = signal.Signals(number).name
        raise CutOff("the time ran out" if reason == "SIGALRM" else reason)

    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGALRM"):
        numbers.append(signal.SIGALRM)
        signal.alarm(math.ceil(seconds))
    before = {number: signal.signal(number, cut_off) for number in numbers}
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_tests(seconds: float) -> Row:
    """Run the tests marked cuda, in parallel if pytest-xdist is installed."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": None, "tail": ["not run: pytest is not installed"]}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        tests = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            with contextlib.suppress(OSError):  # the group has ended
                os.killpg(tests.pid, signal.SIGKILL)  # the workers too
            tests.wait()
        output.seek(0)
        tail = output.read().splitlines()[-40:]
    cut = [f"cut off after {seconds:.0f} s: {tail[-1] if tail else ''}"] if status == 124 else []
    return {"status": status, "tail": [*tail, *cut] or ["no output"]}


def _measurements(options: argparse.Namespace, ends: float) -> Iterator[Row]:
    """The rows, the most important first; a row that can't be measured says why."""
    bandwidth: list[float] = []
    for row in _guarded(partial(_read_bandwidth, options.device, bandwidth)):
        yield row
    config = SIZES[options.size]()
    measured = partial(_of_precision, config, options, ends, *bandwidth)
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (precision, partial(measured, precision=Precision(precision)))
        for precision in ("bfloat16", "int8", "int4", "float16", "float32")
    ]
    for name, compiled in (("transformers, eager", False), ("transformers, compiled", True)):
        if not (compiled and options.no_compile):
            parts.append((name, partial(_of_transformers, config, compiled, options, ends)))
    for setting in ("bfloat16", "float32", "lora"):
        tuning = partial(_of_finetuning, config, setting, options.device)
        parts.append((f"fine-tuning, {setting}", tuning))
    late = ("float16", "float32")  # the least used
    for name, part in sorted(parts, key=lambda part: part[0] in late):
        if time.monotonic() >= ends:
            yield {"precision": name, "what": "skipped", "error": "no time was left"}
            continue
        for row in _guarded(part):
            yield {"precision": name, **row}
        _release_memory()


def _guarded(part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a measurement; an exception of any kind becomes a row."""
    try:
        yield from part()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        yield {"what": "failed", "error": f"{type(error).__name__}: {reason}"}


def _read_bandwidth(device: str, found: list[float]) -> Iterator[Row]:
    found.append(read_bandwidth(device))
    yield {"what": "read bandwidth, GB/s", "value": found[0] / 1e9}


def _release_memory() -> None:
    """Free graphs, which hold the weights and caches that they were compiled with, and memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _of_finetuning(config: GPT2MLConfig, setting: str, device: str) -> Iterator[Row]:
    """Time the second of two steps on a row of full length; memory, measured and predicted."""
    length = config.max_position_embeddings
    settings = dataclasses.replace(settings_of(setting, length=length), device=device)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2ML(config).to(weight_dtype(settings))
    prepare_model(model, settings)
    objective = Objective(model, chunk=settings.loss_chunk)
    stepper = Stepper(objective, make_optimizer(objective, settings), settings)
    ids = torch.randint(1, config.vocab_size, (1, length + 1), device=device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        began = time.perf_counter()
        stepper.step([next_token_rows(ids)], settings.learning_rate_used)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    yield {"what": "tokens/s", "value": length / seconds}
    if on_gpu:
        yield {"what": "memory, GiB", "value": torch.cuda.max_memory_allocated() / 2**30}
    predicted = estimate_memory(settings, config).total / 2**30
    yield {"what": "predicted memory, GiB", "value": predicted}


def _of_transformers(
    config: GPT2MLConfig, compiled: bool, options: argparse.Namespace, ends: float
) -> Iterator[Row]:
    """Decode by `generate` of a GPT-2 of the same size in bfloat16; if compiled, a static cache."""
    peer = TransformersGPT2(config, "bfloat16", compile=compiled, device=options.device)
    new = min(64, config.max_position_embeddings - PROMPT - 1)
    for batch in (1, 8):
        if time.monotonic() < ends:
            peer.decode(batch, new)  # warms up
            rate = new * batch / peer.decode(batch, new)
            yield {"what": f"decode at batch {batch}, tokens/s", "value": rate}


def _of_precision(
    config: GPT2MLConfig,
    options: argparse.Namespace,
    ends: float,
    bandwidth: float | None = None,
    *,
    precision: Precision,
) -> Iterator[Row]:
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device(options.device):
        model = GPT2ML(config).to(activation_dtype(precision)).eval()
    if precision.is_integer:
        kernels.pack_model(model, precision)
        model.packed = precision
    yield {"what": "made on the device, s", "value": time.perf_counter() - began}
    tokenizer = Tokenizer(weights.vocabulary(config), num_embeddings=config.vocab_size)
    generator = Generator(model, tokenizer, compile=not options.no_compile, batch_size=128)
    began = time.perf_counter()
    _generate(generator, rows=1, tokens=16, new=4)
    yield {"what": "first tokens, compiling, s", "value": time.perf_counter() - began}
    weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    for tokens in (128, 512, 1000):
        if tokens < config.max_position_embeddings - 2 and time.monotonic() < ends:
            _generate(generator, rows=1, tokens=tokens, new=1)
            began = time.perf_counter()
            _generate(generator, rows=1, tokens=tokens, new=1)
            rate = tokens / (time.perf_counter() - began)
            yield {"what": f"prefill {tokens}, tokens/s", "value": rate}
    for batch in (1, 8, 32, 128):
        if time.monotonic() < ends:
            _generate(generator, rows=batch, tokens=64, new=8)
            stats = _generate(generator, rows=batch, tokens=64, new=64)
            steps = stats.steps / stats.step_seconds
            row: Row = {"what": f"decode at batch {batch}, tokens/s", "value": steps * batch}
            if bandwidth is not None:
                row["share_of_bandwidth"] = steps * weight_bytes / bandwidth
            yield row
        if batch == 1 and time.monotonic() < ends:
            between = _seconds_between_steps(generator)
            yield {"what": "host time between steps, ms", "value": between * 1e3}


def _seconds_between_steps(generator: Generator) -> float:
    """The mean time from the end of a model's step to the start of the next, on the device.

    This is the cost of the loop around the model at batch 1, sampling included.
    """
    engine, on_gpu = generator.engine, generator.engine.on_cuda
    decode, marks = engine.decode, []

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(*arguments: Any) -> Tensor:
        began = mark()
        logits = decode(*arguments)
        marks.append((began, mark()))
        return logits

    engine.decode = timed  # type: ignore[method-assign, assignment]
    try:
        _generate(generator, rows=1, tokens=64, new=64)
    finally:
        engine.decode = decode  # type: ignore[method-assign]
    if on_gpu:
        torch.cuda.synchronize()
    gaps = [
        end.elapsed_time(start) / 1e3 if on_gpu else start - end
        for (_, end), (start, _) in pairwise(marks)
    ]
    return statistics.fmean(gaps)


def _generate(generator: Generator, *, rows: int, tokens: int, new: int) -> Stats:
    stats = Stats()
    generator.complete(
        weights.prompt(tokens),
        stats=stats,
        num_return_sequences=rows,
        top_k=5,
        min_new_tokens=new,
        max_new_tokens=new,
        seed=0,
    )
    return stats


if __name__ == "__main__":
    sys.exit(main())
