"""Run all checks of a model file, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gpt2ml_torch import kernels
from gpt2ml_torch.checking.arithmetic import check_arithmetic
from gpt2ml_torch.checking.finding import Finding
from gpt2ml_torch.checking.language import (
    LEAST_MARGIN,
    Reading,
    best_of,
    check_language,
    is_large,
    read_sentences,
)
from gpt2ml_torch.checking.machine import check_machine, free_bytes, leave_kernels, load
from gpt2ml_torch.checking.statistics import check_tensors
from gpt2ml_torch.devices import choose_device
from gpt2ml_torch.generation import Generator
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.precision import Precision
from gpt2ml_torch.tokenizer import Tokenizer

PUBLISHED_15G = "GPT2_ML, 15G corpus"
REPORTED = (
    "你好，我是一名大三的学生，我的专业是电气工程及其自动化"  # by another port's test, greedy
)
AGREEMENT_TOKENS = 24  # of the text on which the precisions are compared


def check_model(
    file: ModelFile, *, device: torch.device | str = "cpu", precisions: bool = True
) -> Iterator[Finding]:
    """Yield findings about the file, its vocabulary and language, and this machine.

    Takes a minute or two at the published size on two cores. `precisions=False` leaves out the
    measurements of this machine, and takes less. Raises `ValueError` and `OSError` for a file that
    can't be read at all; every other fault is a finding.
    """
    device = choose_device(device)
    yield _describe(file)
    yield check_arithmetic()
    readable = True
    for finding in check_tensors(file):
        readable = readable and finding.verdict != "fail"
        yield finding
    if file.vocab is None:
        yield Finding("vocabulary and language", "fail", "the file holds no vocabulary")
        return
    tokenizer = file.tokenizer()
    model = _model_for_reading(file, device)
    readings = read_sentences(model, tokenizer)
    if model.packed is not None and not _tells(readings):
        # Wrong kernels must not pass for wrong weights: plain PyTorch decides.
        leave_kernels(model)
        readings = read_sentences(model, tokenizer)
        if _tells(readings):
            text = "they make nonsense of sentences that plain PyTorch reads well"
            yield Finding("kernels", "fail", text)
    yield from check_language(model, readings)
    if file.source.get("published") == PUBLISHED_15G:
        yield _continuation(model, tokenizer)
    best = best_of(readings)
    if not precisions:
        return
    if best is None or not readable:
        yield Finding("this machine", "info", "not measured, because of the failures above")
        return
    del model
    ids = best.ids[:, :AGREEMENT_TOKENS]
    yield from check_machine(file, tokenizer, ids, device=device)


def _tells(readings: list[Reading]) -> bool:
    """Whether the model tells a sentence from nonsense."""
    best = best_of(readings)
    return best is not None and best.margin >= LEAST_MARGIN


def _describe(file: ModelFile) -> Finding:
    config = file.config
    origin = file.source.get("published") or file.source.get("name") or "unknown origin"
    text = (
        f"{config.num_parameters:,} parameters in {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {file.precision}, {file.size:,} bytes; from {origin}"
    )
    values = {
        "parameters": config.num_parameters,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "precision": str(file.precision),
        "bytes": file.size,
        "published": file.source.get("published"),
    }
    return Finding("file", "pass", text, values)


def _model_for_reading(file: ModelFile, device: torch.device) -> GPT2ML:
    """Load the model for the language checks, in the file's dtype where that is practical.

    On a CPU with kernels a large model is loaded in int8, which changes each loss by less than
    0.01. If the weights would not fit the memory in float32, they are loaded in bfloat16.
    """
    if device.type != "cpu":
        return GPT2ML.from_file(file, device=device)
    if file.packed is None and is_large(file.config) and kernels.load_kernels():
        return load(file, Precision.INT8, device)
    free = free_bytes(device)
    needed = 0 if free is None else file.config.num_parameters * 4 + (1 << 30)
    small = free is not None and needed > free and file.packed is None
    dtype = torch.bfloat16 if small else None
    if file.dtype == "float16":
        dtype = torch.float32  # CPUs multiply it much faster than float16
    return GPT2ML.from_file(file, dtype=dtype)


def _continuation(model: GPT2ML, tokenizer: Tokenizer) -> Finding:
    """Compare our greedy continuation with the one that another port reported."""
    count = len(tokenizer.encode(REPORTED)) - 2
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    text = Generator(model, tokenizer, compile=False).generate("你好", **options)[0]
    same = "the same as" if text.startswith(REPORTED) else "not the same as"
    line = f"{text}: {same} the one that another port reported ({REPORTED})"
    return Finding("greedy continuation of 你好", "info", line, {"text": text})
