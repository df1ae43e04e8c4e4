"""All checks of a model file, one after the other."""

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
    """Findings about the file, its vocabulary and language, and this machine, as they come.

    Takes a minute or two at the published size on two cores, and less without `precisions`, which
    leaves out what concerns this machine. Raises `ValueError` and `OSError` for what can't be read
    at all; everything else is a finding.
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
        # Wrong kernels must not be taken for wrong weights: plain PyTorch has the last word.
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
    """Whether a sentence is told from nonsense."""
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
    """In the file's dtype; a large one in int8 on a CPU with kernels, which moves no loss by 0.01.

    In bfloat16 where the file's dtype would not fit the memory.
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
        dtype = torch.float32  # which CPUs multiply much faster
    return GPT2ML.from_file(file, dtype=dtype)


def _continuation(model: GPT2ML, tokenizer: Tokenizer) -> Finding:
    """The greedy continuation that another port reported, beside ours."""
    count = len(tokenizer.encode(REPORTED)) - 2
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    text = Generator(model, tokenizer, compile=False).generate("你好", **options)[0]
    same = "the same as" if text.startswith(REPORTED) else "not the same as"
    line = f"{text}: {same} the one that another port reported ({REPORTED})"
    return Finding("greedy continuation of 你好", "info", line, {"text": text})
