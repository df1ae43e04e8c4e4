"""The cuda tests and the speed of a random model made on the device, within a time limit.

Results are written after every measurement, so that a run that is cut off loses only the last. What
fails, or is not installed, becomes a row that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import GPT2ML, Generator, GPT2MLConfig, Tokenizer, kernels
from gpt2ml_torch.bandwidth import read_bandwidth
from gpt2ml_torch.finetuning import Objective, estimate_memory, next_token_rows
from gpt2ml_torch.finetuning.components import make_optimizer, prepare_model, weight_dtype
from gpt2ml_torch.finetuning.step import Stepper
from gpt2ml_torch.generation import Stats
from gpt2ml_torch.modelfile.pretrained import activation_dtype
from gpt2ml_torch.precision import Precision
from scripts.benchmarks import machine, weights
from scripts.benchmarks.peers import PROMPT, TransformersGPT2
from scripts.benchmarks.tuning_contestant import settings_of

ROOT = Path(__file__).resolve().parents[2]
TINY = GPT2MLConfig(
    vocab_size=600,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    intermediate_size=128,
    max_position_embeddings=256,
)
SIZES: dict[str, Callable[[], GPT2MLConfig]] = {"tiny": lambda: TINY, **weights.SIZES}
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run everything; status 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--seconds", type=float, default=520, help="no measurement begins later")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu tries the program out")
    ends = time.monotonic() + options.seconds
    rows: list[Row] = []
    tests = _run_tests(options.seconds / 2) if options.device.startswith("cuda") else None
    for row in _measurements(options, ends):
        rows.append(row)
        _write(options, tests, rows)
    print(_table(options, tests, rows))
    return 0 if tests is None or tests["status"] == 0 else 1


def _run_tests(seconds: float) -> Row:
    """The tests marked cuda, in parallel where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": 124, "tail": [f"cut off after {seconds:.0f} s"]}
    return {"status": done.returncode, "tail": (done.stdout + done.stderr).splitlines()[-20:]}


def _measurements(options: argparse.Namespace, ends: float) -> Iterator[Row]:
    bandwidth = read_bandwidth(options.device)
    yield {"what": "read bandwidth, GB/s", "value": bandwidth / 1e9}
    config = SIZES[options.size]()
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (precision, partial(_of_precision, config, Precision(precision), bandwidth, options, ends))
        for precision in ("bfloat16", "float16", "float32", "int8", "int4")
    ]
    for name, compiled in (("transformers, eager", False), ("transformers, compiled", True)):
        if not (compiled and options.no_compile):
            parts.append((name, partial(_of_transformers, config, compiled, options, ends)))
    for setting in ("bfloat16", "float32", "lora"):
        tuning = partial(_of_finetuning, config, setting, options.device)
        parts.append((f"fine-tuning, {setting}", tuning))
    for name, part in parts:
        if time.monotonic() >= ends:
            yield {"precision": name, "what": "skipped", "error": "no time was left"}
            continue
        try:
            for row in part():
                yield {"precision": name, **row}
        except Exception as error:  # memory, compilers and packages fail in many ways: a row too
            reason = (str(error).splitlines() or [""])[0]
            failure = f"{type(error).__name__}: {reason}"
            yield {"precision": name, "what": "failed", "error": failure}


def _of_finetuning(config: GPT2MLConfig, setting: str, device: str) -> Iterator[Row]:
    """One step on the longest row, the second of two, and its memory beside the prediction."""
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
    """GPT-2 of the same size in bfloat16, through `generate`; compiled with a static cache."""
    peer = TransformersGPT2(config, "bfloat16", compile=compiled, device=options.device)
    new = min(64, config.max_position_embeddings - PROMPT - 1)
    for batch in (1, 8):
        if time.monotonic() < ends:
            peer.decode(batch, new)  # warms up
            rate = new * batch / peer.decode(batch, new)
            yield {"what": f"decode at batch {batch}, tokens/s", "value": rate}


def _of_precision(
    config: GPT2MLConfig,
    precision: Precision,
    bandwidth: float,
    options: argparse.Namespace,
    ends: float,
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
            share = steps * weight_bytes / bandwidth
            row: Row = {"what": f"decode at batch {batch}, tokens/s", "value": steps * batch}
            yield {**row, "share_of_bandwidth": share}


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


def _write(options: argparse.Namespace, tests: Row | None, rows: list[Row]) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine.describe(),
        "device": options.device,
        "size": options.size,
        "tests": tests,
        "rows": rows,
    }
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(_table(options, tests, rows))
    if importlib.util.find_spec("matplotlib"):
        _plot(rows, options.out.with_suffix(".png"))


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    bars = {
        f"{row['precision']}, {row['what'].removesuffix(', tokens/s')}": row["value"]
        for row in rows
        if row["what"].startswith("decode")
    }
    figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(bars), list(bars.values()))
    axes.set_xlabel("tokens/s")
    figure.savefig(path)


def _table(options: argparse.Namespace, tests: Row | None, rows: list[Row]) -> str:
    about = machine.describe()
    lines = [
        f"{about['date']}, GPU: {about['gpu']}, {about['processor']}; Python {about['python']}, "
        f"torch {about['torch']}; {options.size} on {options.device}, random weights.",
        "",
        f"Tests: {tests['tail'][-1] if tests else 'none on this device'}",
        "",
        "| precision | measured | value | of the bandwidth |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        value = f"{row['value']:.4g}" if "value" in row else row["error"]
        share = f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else ""
        lines.append(f"| {row.get('precision', '')} | {row['what']} | {value} | {share} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
