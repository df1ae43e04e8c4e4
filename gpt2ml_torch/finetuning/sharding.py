"""Several processes: FSDP2 over the blocks, started by `torchrun`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from gpt2ml_torch.finetuning.objective import Objective


def process_count() -> int:
    """Processes of this run: 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def processes(device: str = "cpu") -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did, for the length of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(objective: Objective) -> None:
    """Divide every weight among the processes by its rows, in place; nothing for a single one."""
    if process_count() == 1:
        return
    mesh = dist.init_device_mesh(objective.model.device.type, (process_count(),))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
