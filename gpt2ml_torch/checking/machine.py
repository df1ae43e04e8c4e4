"""Check that this machine computes correct logits in each precision, and measure its speed.

For each precision three sets of logits are computed from the same stored weights: through kernels
(where there are any) and the key-value cache; in plain eager PyTorch in the same dtype; and with
float64 activations, as the reference. The error of the first may be at most twice the error of the
second, plus one rounding. Kernels for integer weights round the activations to 8 bits too, so their
error may also be as large as the change of the logits that quantising the weights causes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2ml_torch import kernels
from gpt2ml_torch.bandwidth import read_bandwidth
from gpt2ml_torch.checking.finding import Finding, judge
from gpt2ml_torch.checking.language import is_large
from gpt2ml_torch.generation import Generator
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.pretrained import activation_dtype
from gpt2ml_torch.precision import FLOATING, Precision
from gpt2ml_torch.tokenizer import Tokenizer

STEPS = 6  # tokens at the end of the text that are read one by one; the others are read at once
PROMPT = "今天"
NEW_TOKENS = 16  # written to measure the speed
FREE_DIVERGENCE = 0.01  # nats a token that a precision may cost and still be recommended
TIMES = 2.0  # the error allowed, as a multiple of plain PyTorch's error
# The same for float32, where only the order of summation differs: the kernels add thousands of
# products in a few chains, BLAS adds them in blocks. At the published size that makes a factor of
# four; a wrong kernel errs by a factor of thousands.
TIMES_FLOAT32 = 16.0
CANDIDATES = (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8, Precision.INT4)
_SPARE_BYTES = 1 << 30  # for activations, the cache and the compiler


@dataclasses.dataclass(frozen=True)
class Measured:
    """One precision, measured on this machine; errors are root mean squares over the logits."""

    precision: Precision
    divergence: float  # Kullback-Leibler, from the first precision's exact logits; nats a token
    error: float  # of the logits through kernels and cache
    plain_error: float  # of plain PyTorch in the same dtype
    rounding: float  # one rounding of the logits to the activations' dtype
    moved: float  # the change of the exact logits by storing the weights in this precision
    tokens_per_second: float
    weight_bytes: int

    @property
    def allowed(self) -> float:
        times = TIMES_FLOAT32 if self.precision is Precision.FLOAT32 else TIMES
        allowed = times * self.plain_error + self.rounding
        return max(allowed, self.moved) if self.precision.is_integer else allowed

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed


def check_machine(
    file: ModelFile, tokenizer: Tokenizer, ids: Tensor, *, device: torch.device
) -> Iterator[Finding]:
    """Measure every precision that fits the memory, and recommend one.

    `ids`, (1, T), are a text that the model knows well. The first precision is the closest to the
    file's: its logits in float64 are the reference for the others.
    """
    results = []
    logits: Tensor | None = None
    bandwidth = 0.0
    for precision in candidates(file, device):
        if not _fits(file, precision, device):
            line = "not tried: the weights don't fit the free memory"
            yield Finding(f"precision {precision}", "info", line)
            continue
        bandwidth = bandwidth or read_bandwidth(device)
        result, exact = measure(file, tokenizer, ids, precision, device, expected=logits)
        logits = exact if logits is None else logits
        results.append(result)
        yield _judge(result, bandwidth)
    good = [r for r in results if r.agrees and r.divergence <= FREE_DIVERGENCE]
    if not good:
        return
    best = max(good, key=lambda result: result.tokens_per_second)
    yield check_compiled(file, tokenizer, best.precision, device)
    yield _recommend(best, file)


def candidates(file: ModelFile, device: torch.device) -> tuple[Precision, ...]:
    """The precisions in which a file can be loaded; the integer ones need the CPU's kernels."""
    if file.packed is not None:
        return (file.packed,)
    if device.type != "cpu" or not kernels.load_kernels():
        return tuple(p for p in CANDIDATES if p in FLOATING)
    # Packing into more bits than the file has gains nothing.
    return tuple(p for p in CANDIDATES if p.bits <= file.dtype.bits or file.dtype not in CANDIDATES)


def load(file: ModelFile, precision: Precision, device: torch.device) -> GPT2ML:
    """Load the model in a precision: packed if there are kernels, otherwise in plain PyTorch."""
    packs = device.type == "cpu" and kernels.load_kernels() and file.packed is None
    return GPT2ML.from_file(
        file,
        device=device,
        dtype=activation_dtype(precision),
        precision=precision if packs else None,
    )


def measure(
    file: ModelFile,
    tokenizer: Tokenizer,
    ids: Tensor,
    precision: Precision,
    device: torch.device,
    *,
    expected: Tensor | None = None,
) -> tuple[Measured, Tensor]:
    """Load the weights in a precision, and measure its errors, divergence and speed.

    Also returns its logits with exact activations, (T, V) float64. The divergence is measured
    against `expected`, (T, V) float64, or against these exact logits if it is None.
    """
    model = load(file, precision, device)
    dtype, ids = model.dtype, ids.to(device)
    # Float32 is exact enough beside 16-bit activations, and unpacking weights to it is faster.
    sparing = precision.is_integer and dtype.itemsize == 2 and is_large(model.config)
    wide = torch.float32 if sparing else torch.float64
    speed = _tokens_per_second(model, tokenizer)
    with torch.inference_mode():
        found = _logits_in_steps(model, ids)
        leave_kernels(model)
        plain = model(ids)[0].double().cpu()
        _compute_in(wide, model)
        exact = model(ids)[0].double().cpu()
    expected = exact if expected is None else expected
    measured = Measured(
        precision=precision,
        divergence=_divergence(expected, found),
        error=_size(found - exact),
        plain_error=_size(plain - exact),
        rounding=torch.finfo(dtype).eps / 2 * _size(exact),
        moved=_size(exact - expected),
        tokens_per_second=speed,
        weight_bytes=_bytes_of_weights(file, precision),
    )
    return measured, exact


def check_compiled(
    file: ModelFile, tokenizer: Tokenizer, precision: Precision, device: torch.device
) -> Finding:
    """Check that steps compiled by torch.compile write the same text as eager steps."""
    name = "compiled steps"
    if device.type == "cpu" and kernels.load_kernels():
        line = "nothing is compiled here: the kernels run all layers as one operator"
        return Finding(name, "info", line)
    model = load(file, precision, device)
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }
    eager = Generator(model, tokenizer, compile=False).generate(PROMPT, **options)[0]
    began = time.perf_counter()
    try:
        compiled = Generator(model, tokenizer, compile=True).generate(PROMPT, **options)[0]
    except Exception as error:  # the compiler raises many types; generation works without it
        line = f"torch.compile does not work here ({type(error).__name__}): use --no-compile"
        return Finding(name, "info", line)
    seconds = time.perf_counter() - began
    faults = []
    if compiled != eager:
        faults.append(f"they write {compiled!r}, eager steps {eager!r}")
    line = f"the text of eager steps in {precision}; compiled in {seconds:.0f} s"
    return judge(name, faults, line, seconds=seconds)


def _logits_in_steps(model: GPT2ML, ids: Tensor) -> Tensor:
    """Logits of a text whose last tokens are read one by one through a cache: (T, V) float64."""
    length = ids.shape[1]
    cache = KVCache(
        model.config, batch_size=1, length=length, dtype=model.dtype, device=model.device
    )
    positions = torch.arange(length, device=ids.device)[None]
    starts = [0, *range(max(length - STEPS, 1), length), length]
    pieces = [
        model(ids[:, start:end], positions=positions[:, start:end], cache=cache)[0]
        for start, end in pairwise(starts)
    ]
    return torch.cat(pieces).double().cpu()


def leave_kernels(model: GPT2ML) -> None:
    """Make packed layers compute in plain PyTorch, which unpacks their weights."""
    for module in model.modules():
        if isinstance(module, kernels.PackedLinear | kernels.PackedEmbedding):
            module.has_kernel = False


def _compute_in(dtype: torch.dtype, model: GPT2ML) -> None:
    """Make the model compute in `dtype`.

    A linear layer is widened only while it is used, so memory holds one widened layer at a time.
    Packed weights stay as they are, since plain PyTorch unpacks them for each product. All other
    weights are widened at once.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, kernels.PackedLinear):
            _widen_while_used(module, dtype)
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        if isinstance(module, kernels.PackedEmbedding):
            module.dtype = dtype


def _widen_while_used(layer: nn.Linear, dtype: torch.dtype) -> None:
    narrow: list[tuple[nn.Parameter, Tensor]] = []

    def widen(*_: Any) -> None:
        for parameter in layer.parameters():
            narrow.append((parameter, parameter.data))
            parameter.data = parameter.data.to(dtype)

    def restore(*_: Any) -> None:
        while narrow:
            parameter, data = narrow.pop()
            parameter.data = data

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(restore)


def _tokens_per_second(model: GPT2ML, tokenizer: Tokenizer) -> float:
    """The speed for one text without compiled steps; the better of two runs, one if large."""
    generator = Generator(model, tokenizer, compile=False)

    def rate(count: int) -> float:
        began = time.perf_counter()
        generator.generate(PROMPT, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        return count / (time.perf_counter() - began)

    rate(2)  # warms up
    if is_large(model.config):
        return rate(NEW_TOKENS // 2)
    return max(rate(NEW_TOKENS), rate(NEW_TOKENS))


def _judge(result: Measured, bandwidth: float) -> Finding:
    name = f"precision {result.precision}"
    share = result.tokens_per_second * result.weight_bytes / bandwidth
    values = {
        "divergence": result.divergence,
        "error": result.error,
        "plain_error": result.plain_error,
        "allowed_error": result.allowed,
        "tokens_per_second": result.tokens_per_second,
        "share_of_bandwidth": share,
        "read_bandwidth": bandwidth,
    }
    text = (
        f"logits off by {result.error:.2g} (plain PyTorch {result.plain_error:.2g}), divergence "
        f"{result.divergence:.2g} nats a token, {result.tokens_per_second:.1f} tokens/s "
        f"({share:.0%} of the read bandwidth)"
    )
    faults = []
    if not result.agrees:
        faults.append(
            f"the logits are off by {result.error:.2g}, and rounding explains only "
            f"{result.allowed:.2g}: the kernels or the cache are wrong here"
        )
    return judge(name, faults, text, **values)


def _recommend(best: Measured, file: ModelFile) -> Finding:
    option = "the file as it is" if file.packed is not None else f"--quantize {best.precision}"
    text = (
        f"{option}: the fastest here ({best.tokens_per_second:.1f} tokens/s) of those that move "
        f"the model's distribution by at most {FREE_DIVERGENCE} nats a token"
    )
    return Finding("what to take", "info", text, {"precision": str(best.precision)})


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence over the tokens, in nats."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def _bytes_of_weights(file: ModelFile, precision: Precision) -> int:
    return file.config.num_parameters * precision.bits // 8


def _fits(file: ModelFile, precision: Precision, device: torch.device) -> bool:
    free = free_bytes(device)
    return free is None or _bytes_of_weights(file, precision) + _SPARE_BYTES < free


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that can be allocated without swapping; None if the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = (_free_in_system(), _free_in_container(), _free_in_process())
    return min((size for size in known if size is not None), default=None)


def _free_in_system() -> int | None:
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left below the limit of a control group (version 2); the page cache counts as free."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # without a limit, it reads "max"
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = (folder / "memory.stat").read_text().split("inactive_file ")[1].split()[0]
        return max(limit - used + int(files), 0)
    return None


def _free_in_process() -> int | None:
    """Bytes left below the limit of `ulimit -v`."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return max(limit - pages * resource.getpagesize(), 0)
    return None


def _size(values: Tensor) -> float:
    """The root mean square; infinite if any is not finite."""
    size = values.square().mean().sqrt().item()
    return size if math.isfinite(size) else math.inf
