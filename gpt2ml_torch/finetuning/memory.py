"""Peak memory of a training step, by kind, before anything is loaded: a step without data.

The tensors are fake (`FakeTensorMode`), so a step of the full size takes seconds and no memory.
Their storages are counted as they come and go (PyTorch's own `MemTracker` does not take frozen
weights). Sizes are those of the tensors, the same on CUDA and on the CPU; kernels' workspaces and
the process itself come on top, and are named `process`.
"""

from __future__ import annotations

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
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers.sliced import SLICE
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile

GIB = 2**30
# What a process takes beside tensors, measured: Python, PyTorch and peft; on CUDA the context.
_PROCESS = {"cpu": int(0.35 * GIB), "cuda": int(0.6 * GIB)}
_SLICES_IN_FLIGHT = 8  # float32 temporaries of a sliced optimizer step


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes at the moment when most are in use, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        """One line for each kind, in GiB."""
        rows = [*dataclasses.asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name:12} {size / GIB:7.2f} GiB" for name, size in rows)


def predict(config: FinetuneConfig, sizes: GPT2MLConfig | None = None) -> Prediction:
    """The memory that a run with these settings takes; `sizes` are its model file's unless given.

    Raises as `finetune` does for a model file that can't be read and for settings that it can't
    have.
    """
    if sizes is None:
        with ModelFile.open(config.model) as file:
            check_model(config, file)
            sizes = file.config
    with torch.device("meta"):
        model = GPT2ML(sizes).to(weight_dtype(config))
    if config.lora_base != "weights":
        pack_blocks(model, config.lora_base)
    prepare_model(model, dataclasses.replace(config, compile=False))
    with FakeTensorMode():
        _make_fake(model)
        return _predict(config, model)


def _make_fake(model: GPT2ML) -> None:
    """Replace every weight by a fake one; peft can't put an adapter on layers that are fake."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            data = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _predict(config: FinetuneConfig, model: GPT2ML) -> Prediction:
    objective = Objective(
        model, chunk=config.loss_chunk, mixed=config.precision == "mixed", packed=config.pack
    ).train()
    optimizer = make_optimizer(objective, config)
    optimizer.allocate()
    slots = sum(_bytes(value) for state in optimizer.state.values() for value in state.values())
    largest = max(parameter.numel() for parameter in optimizer.state)
    watch = _watch_step(objective, config)
    return Prediction(
        weights=sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        gradients=watch.gradients_at_peak,
        optimizer=slots + _SLICES_IN_FLIGHT * 4 * min(SLICE, largest),
        activations=watch.peak - watch.gradients_at_peak,
        process=_PROCESS["cpu" if config.device == "cpu" else "cuda"],
    )


def _watch_step(objective: Objective, config: FinetuneConfig) -> _Watch:
    length = config.length or objective.model.config.max_position_embeddings
    ids = torch.ones(config.batch_size, length, dtype=torch.int64)
    rows = Rows(ids, ids.clone(), torch.zeros_like(ids), torch.ones_like(ids))
    watch = _Watch(objective, keep=not config.step_in_backward)
    with watch:
        objective(rows).backward()
    return watch


class _Watch(TorchDispatchMode):
    """Counts the bytes of storages that come and go beside the weights; remembers the peak."""

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
            # It is whole for the length of its step.
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


def suggestion(config: FinetuneConfig, available: int, sizes: GPT2MLConfig | None = None) -> str:
    """One line: the smallest change of settings with which the run fits into so many bytes."""
    names: list[str] = []
    tried = config
    for name, values in _changes(config, sizes):
        changed = dataclasses.replace(tried, **values)
        if changed == tried:
            continue
        tried, names = changed, [*names, name]
        total = predict(tried, sizes).total
        if total <= available:
            return f"that does not fit; it would with {', '.join(names)}: {total / GIB:.2f} GiB"
    return f"that does not fit into {available / GIB:.2f} GiB, and no setting here would"


def _changes(
    config: FinetuneConfig, sizes: GPT2MLConfig | None
) -> list[tuple[str, dict[str, Any]]]:
    """Settings that save memory, those that cost least first."""
    if sizes is None:
        with ModelFile.open(config.model) as file:
            sizes = file.config
    half = (config.length or sizes.max_position_embeddings) // 2
    kept = {"train_layers": None, "layer_decay": 1.0, "freeze_embeddings": False}
    kept_gradients = {"step_in_backward": True, "accumulate": 1, "clip_norm": None}
    return [
        ("gradient checkpointing", {"gradient_checkpointing": True}),
        ("the step inside the backward pass (no --keep-gradients)", kept_gradients),
        ("--optimizer adafactor", {"optimizer": "adafactor"}),
        ("--batch-size 1", {"batch_size": 1}),
        ("--precision bfloat16", {"precision": "bfloat16"}),
        ("--lora-rank 16", {"lora_rank": config.lora_rank or 16, **kept}),
        ("--lora-base int8", {"lora_base": "int8"}),
        ("--lora-base int4", {"lora_base": "int4"}),
        (f"--length {half}", {"length": max(2, half)}),
    ]


def parse_size(text: str) -> int:
    """Bytes of "22GB", "24 GiB" or "800MB"; raises `ValueError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--memory is {text!r}; expected a size such as 22GB or 24GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper())))


# -- measured --


_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_LARGE = 2 << 20  # bytes; the temporaries of an optimizer's step are smaller
_SPARE = 8 << 20  # bytes at the heap's end, for those temporaries


def tune_allocator() -> bool:
    """Give freed blocks of 2 MB and more back to the system at once; True if that can be.

    By default glibc raises this limit up to 32 MB as blocks are freed, and activations of changing
    sizes then leave holes in its heap. Smaller blocks are used again: memory fresh from the system
    costs an optimizer's step four times the time. For the command line and for benchmarks: it
    concerns the whole process.
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
    """Memory in use now: the resident set, or what PyTorch has allocated on a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return _status("VmRSS")


def peak_gib(device: torch.device | str = "cpu") -> float:
    """The most that was in use so far."""
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
