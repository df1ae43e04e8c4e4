"""Training in several processes: ranks, sums over the processes, and sharding with FSDP2.

`torchrun` starts the processes. Without it, these functions describe a single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gpt2ml_torch.finetuning.objective import Objective


@contextlib.contextmanager
def processes(device: torch.device | str = "cpu") -> Iterator[None]:
    """Join the process group that `torchrun` set up, if any; leave it when the block ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def process_count() -> int:
    """The number of processes in this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every process gets here."""
    if dist.is_initialized():
        dist.barrier()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if process_count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


def shard(objective: Objective, *, upcast: bool = False) -> None:
    """Shard every weight by rows over the processes, in place; a single process is left alone.

    With `upcast`, weights are gathered in float32 and products are computed in float32.
    """
    if process_count() == 1:
        return
    options: dict[str, Any] = {
        "mesh": dist.init_device_mesh(objective.model.device.type, (process_count(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32 if upcast else None),
    }
    for block in objective.model.blocks:
        fully_shard(block, **options)
    fully_shard(objective, **options)
