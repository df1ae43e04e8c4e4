"""Memory of a training run: estimated before anything is loaded, checked, and measured.

An estimate runs one step on fake tensors (`FakeTensorMode`), so a step of the full size takes
seconds and no memory. Storages are counted as they are allocated and freed (PyTorch's own
`MemTracker` does not accept frozen weights). The tensors' sizes are the same on CUDA and on the
CPU; the workspaces of kernels and the process itself are added as `process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning.checks import check_model
from gpt2ml_torch.finetuning.components import (
    make_optimizer,
    pack_blocks,
    prepare_model,
    weight_dtype,
)
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.finetuning.distributed import process_count
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers.sliced import SLICE
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import expected_shapes
from gpt2ml_torch.options import OptionError

GIB = 2**30
# Bytes of a process beside its tensors, as measured: Python, PyTorch and peft; on CUDA the context.
_PROCESS = {"cpu": int(0.35 * GIB), "cuda": int(0.6 * GIB)}
# The same on a CPU with a build of PyTorch for GPUs, whose libraries are loaded there too.
_PROCESS_OF_GPU_BUILD = int(0.75 * GIB)
_SLICES_IN_FLIGHT = 8  # float32 temporaries of a sliced optimizer step
_MOST_CHUNKS = 512  # chunks of logits in a step on fake tensors
_BYTES_A_TOKEN = 4 * 8  # four fields of `Rows`, int64
SHORTEST = 32  # tokens of the shortest batch: rows are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind, at the moment of peak use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        """One line for each kind, in GiB."""
        rows = [*dataclasses.asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name:12} {size / GIB:7.2f} GiB" for name, size in rows)


def estimate_memory(config: FinetuneConfig, sizes: GPT2MLConfig | None = None) -> MemoryEstimate:
    """Estimate the memory of a run with these settings.

    `sizes` are read from the model file unless given. Raises as `finetune` does, for a model file
    that can't be read and for settings that don't fit it.
    """
    if sizes is None:
        with ModelFile.open(config.model) as file:
            check_model(config, file)
            sizes = file.config
    rows = config.batch_size
    length = config.length or sizes.max_position_embeddings
    most = max(2, _MOST_CHUNKS * config.loss_chunk // length)  # rows in a fake step
    if rows <= most:
        return _estimate(config, sizes)
    # A fake step with many chunks of logits is slow. Activations grow linearly with the rows, so
    # two smaller steps are extrapolated.
    less, more = (
        _estimate(dataclasses.replace(config, batch_size=size), sizes) for size in (most // 2, most)
    )
    slope = (more.activations - less.activations) / (most - most // 2)
    return dataclasses.replace(more, activations=int(more.activations + slope * (rows - most)))


def _estimate(config: FinetuneConfig, sizes: GPT2MLConfig) -> MemoryEstimate:
    """Estimate by one step on fake tensors."""
    with torch.device("meta"):
        model = GPT2ML(sizes).to(weight_dtype(config))
    if config.lora_base != "weights":
        pack_blocks(model, config.lora_base)
    prepare_model(model, dataclasses.replace(config, compile=False))
    with FakeTensorMode():
        _make_fake(model)
        return _count(config, model)


def _make_fake(model: GPT2ML) -> None:
    """Replace every weight by a fake one; done after peft, which can't adapt fake layers."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            data = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _count(config: FinetuneConfig, model: GPT2ML) -> MemoryEstimate:
    objective = Objective(
        model, chunk=config.loss_chunk, mixed=config.precision == "mixed", packed=config.pack
    ).train()
    optimizer = make_optimizer(objective, config)
    optimizer.allocate()
    slots = sum(_bytes(value) for state in optimizer.state.values() for value in state.values())
    largest = max(parameter.numel() for parameter in optimizer.state)
    watch = _watch_step(objective, config)
    return MemoryEstimate(
        weights=sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        gradients=watch.gradients_at_peak,
        optimizer=slots + _SLICES_IN_FLIGHT * 4 * min(SLICE, largest),
        activations=watch.peak - watch.gradients_at_peak,
        process=_process_bytes(config.device),
    )


def _process_bytes(device: str) -> int:
    if device == "cpu" and torch.backends.cuda.is_built():
        return _PROCESS_OF_GPU_BUILD
    return _PROCESS["cpu" if device == "cpu" else "cuda"]


def _watch_step(objective: Objective, config: FinetuneConfig) -> _Watch:
    length = config.length or objective.model.config.max_position_embeddings
    ids = torch.ones(config.batch_size, length, dtype=torch.int64)
    rows = Rows(ids, ids.clone(), torch.zeros_like(ids), torch.ones_like(ids))
    watch = _Watch(objective, keep=not config.step_in_backward)
    with watch:
        objective(rows).backward()
    return watch


class _Watch(TorchDispatchMode):
    """Counts the bytes of temporary storages beside the weights, and tracks their peak."""

    def __init__(self, objective: Objective, *, keep: bool) -> None:
        super().__init__()
        self.peak = 0
        self.gradients_at_peak = 0
        self._now = 0
        self._gradients = 0
        self._keep = keep
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in (*objective.parameters(), *objective.buffers()):
            self._known.add(tensor.untyped_storage())
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._keep:
            self._gradients += _bytes(parameter.grad)
        else:
            # A gradient that is used at once exists in full only during its own update.
            self._note(_bytes(parameter.grad))
            parameter.grad = None

    def _note(self, gradients: int) -> None:
        if self._now > self.peak:
            self.peak, self.gradients_at_peak = self._now, gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self._note(self._gradients)
        return results

    def _freed(self, size: int) -> None:
        self._now -= size


def _bytes(value: Any) -> int:
    if hasattr(value, "codes"):
        return _bytes(value.codes) + _bytes(value.scale)
    return int(value.numel() * value.itemsize)


def cheaper_settings(
    config: FinetuneConfig, available: int, sizes: GPT2MLConfig | None = None
) -> tuple[dict[str, Any], int] | None:
    """Changes of settings with which the run fits into `available` bytes.

    Returns the fields that change, in the order in which they were tried (the cheapest in time
    first), and the bytes that the run then takes; None if no change known here makes it fit.
    """
    if sizes is None:
        with ModelFile.open(config.model) as file:
            sizes = file.config
    changes: dict[str, Any] = {}
    tried = config
    for name, value, others in _savings(config, sizes):
        changed = dataclasses.replace(tried, **{name: value}, **others)
        if changed == tried:
            continue
        tried, changes = changed, {**changes, name: value}
        total = estimate_memory(tried, sizes).total
        if total <= available:
            return changes, total
    return None


def _savings(config: FinetuneConfig, sizes: GPT2MLConfig) -> list[tuple[str, Any, dict[str, Any]]]:
    """Settings that save memory, each with the other fields it requires, cheapest in time first."""
    half = (config.length or sizes.max_position_embeddings) // 2
    whole = {"train_layers": None, "layer_decay": 1.0, "freeze_embeddings": False}
    rank = config.lora_rank or min(16, sizes.hidden_size)
    return [
        ("gradient_checkpointing", True, {}),
        ("step_in_backward", True, {"accumulate": 1, "clip_norm": None}),
        ("optimizer", "adafactor", {}),
        ("batch_size", 1, {}),
        ("precision", "bfloat16", {}),
        ("lora_rank", rank, whole),
        ("lora_base", "int8", {}),
        ("lora_base", "int4", {}),
        ("length", max(2, half), {}),
    ]


def check_memory(config: FinetuneConfig, sizes: GPT2MLConfig, *, length: int | None = None) -> None:
    """Raise `ValueError` for a run that certainly needs more memory than this machine has.

    The check is quick and uses a lower bound: weights, optimizer state, one batch of rows of
    `length` tokens (`SHORTEST` if not given) and the outputs of its blocks. `estimate_memory`
    gives the memory that a run really takes.
    """
    least = _least_memory(config, sizes, length or min(SHORTEST, sizes.max_position_embeddings))
    have = memory_of(config.device)
    if have is not None and least > have:
        raise OptionError(
            "this run needs at least {} GiB of memory, and there are {} GiB; use less than "
            "{batch_size} {}, or a smaller {length}, {accumulate} or {lora_rank}",
            f"{least / GIB:,.1f}",
            f"{have / GIB:,.1f}",
            config.batch_size,
        )


def _least_memory(config: FinetuneConfig, sizes: GPT2MLConfig, length: int) -> int:
    itemsize = weight_dtype(config).itemsize
    weights = sizes.num_parameters
    slots = {"adafactor": 0, "adamw8bit": 2, "adamw": 8}[config.optimizer]
    trained = weights
    if config.lora_rank:
        targets = expected_shapes(sizes).items()
        ends = tuple(f"{name}.weight" for name in config.lora_targets)
        trained = config.lora_rank * sum(
            sum(shape) for name, shape in targets if name.endswith(ends)
        )
    elif config.train_layers is not None or config.freeze_embeddings:
        trained = 0  # a low bound needs no more
    stored = {"weights": itemsize, "int8": 1, "int4": 0.5}[config.lora_base] * weights
    stored += 4 * trained * bool(config.lora_rank)
    tokens = config.batch_size * length
    blocks = 1 if config.train_layers is not None else sizes.num_hidden_layers
    passed_on = tokens * sizes.hidden_size * blocks * min(2, itemsize)
    ids = tokens * config.accumulate * _BYTES_A_TOKEN
    everywhere = int(stored + slots * trained + passed_on)
    return everywhere // process_count() + ids // process_count()


def memory_of(device: torch.device | str) -> int | None:
    """Total memory of a device in bytes, on the CPU with swap space; None if it is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        total, swap = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return None
    with contextlib.suppress(OSError, ValueError):  # without a limit, it reads "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total + swap


def parse_size(text: str) -> int:
    """The bytes of a size such as "22GB", "24 GiB" or "800MB"; raises `ValueError` for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; expected one such as 22GB or 24GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper())))


# -- measured -------------------------------------------------------------------------------------


_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_LARGE = 2 << 20  # bytes; the temporaries of an optimizer's step are smaller
_SPARE = 8 << 20  # bytes kept at the heap's end for those temporaries


def tune_allocator() -> bool:
    """Make glibc return freed blocks of 2 MiB and more to the system at once.

    By default glibc raises this threshold up to 32 MiB as blocks are freed, and activations of
    changing sizes then leave holes in its heap. Smaller blocks are reused, because an optimizer
    step with fresh memory from the system takes four times as long. This changes the whole process,
    so only the command line and benchmarks call it. Returns False on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            and library.mallopt(_M_TRIM_THRESHOLD, _SPARE)
        )
    except (OSError, AttributeError):
        return False


def used_gib(device: torch.device | str = "cpu") -> float:
    """Memory in use, in GiB: the resident set, or PyTorch's allocations on a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return _status("VmRSS")


def peak_gib(device: torch.device | str = "cpu") -> float:
    """The peak so far of the memory in use, in GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _status("VmHWM")


def _status(field: str) -> float:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return int(text.split(f"{field}:")[1].split()[0]) / 2**20
