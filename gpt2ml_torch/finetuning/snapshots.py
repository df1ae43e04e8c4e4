"""What a checkpoint of a run holds, and whether a run may go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch.finetuning.checkpoints import (
    CheckpointFolder,
    load_tensors_into,
    read_progress,
)
from gpt2ml_torch.finetuning.config import TrainConfig
from gpt2ml_torch.finetuning.processes import process_count, process_rank
from gpt2ml_torch.finetuning.step import Stepper

# Settings that a run and its continuation may have differently: the losses stay the same.
FREE = frozenset(
    [
        "cache",
        "checkpoint_every",
        "checkpoint_minutes",
        "compile",
        "data",
        "device",
        "folder",
        "fresh_optimizer",
        "gradient_checkpointing",
        "keep",
        "loss_chunk",
        "model",
        "on_spike",
        "out",
        "overwrite",
        "prompts",
        "resume",
        "sample_every",
        "sample_tokens",
        "tensorboard",
        "valid",
    ]
)


@dataclasses.dataclass
class Progress:
    """What changes from step to step beside weights and optimizer."""

    step: int = 0
    tokens: int = 0  # learned so far
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0


class Snapshots:
    """Saves a run as it stands and restores it: weights, slots, random states and progress.

    `data_key` names the data and the base model, so that a run is not resumed on others.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        stepper: Stepper,
        config: TrainConfig,
        *,
        total_steps: int,
        data_key: str | None,
    ) -> None:
        self.folder = folder
        self.stepper = stepper
        self.config = config
        self.total_steps = total_steps
        self.data_key = data_key
        self.saved_step: int | None = None

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint of this step; raises `OSError` where that can't be done."""
        values = dataclasses.asdict(progress) | {
            "watch": self.stepper.watch.state(),
            "processes": process_count(),
            "total_steps": self.total_steps,
            "data": self.data_key,
            "config": _trajectory(self.config),
        }
        path = self.folder.save(progress.step, self._tensors(with_random=True), values)
        self.saved_step = progress.step
        return path

    def restore(self) -> Progress | None:
        """Go back to the latest checkpoint; None if there is none.

        With another number of processes random states begin anew. Raises `ValueError` for one of
        other settings or data, or that is damaged.
        """
        path = self.folder.latest()
        if path is None:
            return None
        values = read_progress(path)
        self._check_same_run(path, values)
        self.stepper.optimizer.allocate()
        same_processes = values["processes"] == process_count()
        tensors = self._tensors(with_random=same_processes)
        load_tensors_into(path, tensors)
        if same_processes:
            self._set_random(tensors)
        else:
            torch.manual_seed(self.config.seed + 1_000_003 * values["step"] + process_rank())
        self.stepper.watch.restore(values["watch"])
        self.saved_step = values["step"]
        names = [field.name for field in dataclasses.fields(Progress)]
        return Progress(**{name: values[name] for name in names})

    def restore_weights(self, step: int) -> None:
        """Take the weights of one step's checkpoint."""
        load_tensors_into(self.folder.at(step), self._weights())

    def _weights(self) -> dict[str, Tensor]:
        """Every trained weight."""
        named = self.stepper.objective.named_parameters()
        return {f"model.{name}": p.detach() for name, p in named if p.requires_grad}

    def _slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every optimizer slot, an 8-bit one as its two tensors."""
        for name, parameter in self.stepper.objective.named_parameters():
            for slot, value in self.stepper.optimizer.state.get(parameter, {}).items():
                if hasattr(value, "codes"):
                    yield f"optimizer.{name}.{slot}.codes", value.codes
                    yield f"optimizer.{name}.{slot}.scale", value.scale
                else:
                    yield f"optimizer.{name}.{slot}", value

    def _tensors(self, *, with_random: bool) -> dict[str, Tensor]:
        """All that changes, as the tensors themselves, not copies."""
        tensors = self._weights() | dict(self._slots())
        if with_random:
            prefix = f"random.{process_rank()}"
            tensors[f"{prefix}.torch"] = torch.get_rng_state()
            tensors[f"{prefix}.rounding"] = self.stepper.optimizer.rounding_state
            if self._device.type == "cuda":
                tensors[f"{prefix}.cuda"] = torch.cuda.get_rng_state(self._device)
        return tensors

    def _set_random(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"random.{process_rank()}"
        torch.set_rng_state(tensors[f"{prefix}.torch"])
        self.stepper.optimizer.rounding_state = tensors[f"{prefix}.rounding"]
        if f"{prefix}.cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{prefix}.cuda"], self._device)

    @property
    def _device(self) -> torch.device:
        return self.stepper.objective.model.device

    def _check_same_run(self, path: Path, values: dict[str, Any]) -> None:
        cure = "or start a new run in another folder"
        now = _trajectory(self.config)
        for name, value in now.items():
            if values["config"].get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} {values['config'].get(name)!r}, now it is "
                    f"{value!r}; resume with the same settings, {cure}"
                )
        found = values["data"], values["total_steps"]
        if found != (self.data_key, self.total_steps):
            raise ValueError(
                f"{path} is of a run of {found[1]} steps on another model, other data or other "
                f"rows than now ({self.total_steps} steps); give the same files and options, {cure}"
            )


def _trajectory(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the losses of a run."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE}
