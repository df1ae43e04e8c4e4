"""Checkpoints of a run: which are kept, what they hold, and how a run resumes from one.

A checkpoint gets its final name only when it is complete and on the disk. It is written and read by
`torch.distributed.checkpoint`, even in a single process, so a run can resume with a different
number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gpt2ml_torch import disk
from gpt2ml_torch.finetuning.distributed import barrier, process_count, process_rank
from gpt2ml_torch.finetuning.optimizers.sliced import local
from gpt2ml_torch.finetuning.step import Stepper
from gpt2ml_torch.finetuning.train_config import TrainConfig
from gpt2ml_torch.options import OptionError, resumable_names

_PROGRESS = "progress.json"
_PREFIX = "step-"
_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointFolder:
    """The checkpoints of one run: the last `keep`, and the best.

    `save` raises `OSError` if a checkpoint can't be written; earlier ones stay as they were.
    """

    def __init__(self, path: Path, *, keep: int = 2) -> None:
        self.path = path
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        names = [entry.name.removeprefix(_PREFIX) for entry in self.path.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return self.at(steps[-1]) if steps else None

    def at(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.path / f"{_PREFIX}{step:08d}"

    def clear(self) -> None:
        """Delete the checkpoints of an earlier run."""
        if process_rank() == 0:
            self.sweep()
            for step in self.steps():
                self._delete(step)
        barrier()

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> Path:
        """Write one checkpoint; `progress` is JSON, and its `best_step` names another to keep."""
        target = self.at(step)
        partial = target.with_name(target.name + _PARTIAL)
        try:
            if process_rank() == 0:
                self.sweep()
                partial.mkdir(parents=True)
                _check_room(partial, tensors)
            barrier()
            _write_tensors(partial, tensors)
            if process_rank() == 0:
                disk.write_synced(partial / _PROGRESS, json.dumps(progress, ensure_ascii=False))
                disk.sync_directory(partial)
                shutil.rmtree(target, ignore_errors=True)  # one that was damaged
                partial.rename(target)
                disk.sync_directory(self.path)
                self._prune(progress.get("best_step"))
            barrier()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror or str(error)
            if error.errno in _FULL:
                reason = "disk full; make room there, then resume the run"
            raise OSError(
                error.errno or errno.EIO, f"can't write the checkpoint {target}: {reason}"
            ) from error
        return target

    def sweep(self) -> None:
        """Remove what killed processes left: checkpoints half written or half deleted."""
        for leftover in self.path.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Rename the folder, then delete it: a kill must not leave half of it under its name."""
        doomed = self.at(step).with_name(self.at(step).name + _PARTIAL)
        self.at(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_progress(folder: Path) -> dict[str, Any]:
    """The `progress` that `save` was given; raises `ValueError` for a damaged checkpoint."""
    try:
        return dict(json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(
            f"{folder} is damaged: {_PROGRESS} is not JSON; delete the folder"
        ) from None


def load_tensors_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint's tensors into `tensors`, whose names and shapes must match.

    Raises `ValueError` for a checkpoint that doesn't fit or is damaged.
    """
    try:
        with _quiet():
            dcp.load(dict(tensors), checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"the checkpoint {folder} does not fit this model and optimizer, or is damaged: "
            f"{_first_line(error)}"
        ) from error


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=1)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _as_os_error(*(failure[0] for failure in error.failures.values())) from error
    except RuntimeError as error:
        raise _as_os_error(error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning about running in a single process, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _check_room(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise `OSError` if the disk has no room for these tensors."""
    needed = sum(local(tensor).nbytes for tensor in tensors.values())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, "no room")


def _as_os_error(*failures: BaseException) -> OSError:
    """One `OSError` for the failures in the processes; PyTorch reports a full disk in words."""
    for failure in failures:
        if isinstance(failure, OSError):
            return failure
    text = "; ".join(map(_first_line, failures))
    return OSError(errno.ENOSPC if "write" in text else errno.EIO, text)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclasses.dataclass
class RunState:
    """The state of a run, apart from weights and optimizer."""

    step: int = 0
    tokens: int = 0  # learned so far
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0


class Snapshots:
    """Saves and restores a run: weights, optimizer slots, random states and progress.

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

    def save(self, progress: RunState) -> Path:
        """Write a checkpoint of this step; raises `OSError` if it can't be written."""
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

    def restore(self) -> RunState | None:
        """Go back to the latest checkpoint; None if there is none.

        With another number of processes the random states start from the seed again. Raises
        `ValueError` for a checkpoint of other settings or data, and for a damaged one.
        """
        if process_rank() == 0:
            self.folder.sweep()
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
        names = [field.name for field in dataclasses.fields(RunState)]
        return RunState(**{name: values[name] for name in names})

    def restore_weights(self, step: int) -> None:
        """Load the weights of one step's checkpoint into the model."""
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
        """Every tensor that a step changes: the tensors themselves, not copies."""
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
                raise OptionError(
                    "{} was made with {" + name + "} {!r}, now it is {!r}; resume with the same "
                    "settings, {}",
                    str(path),
                    values["config"].get(name),
                    value,
                    cure,
                )
        found = values["data"], values["total_steps"]
        if found != (self.data_key, self.total_steps):
            raise ValueError(
                f"{path} belongs to a run of {found[1]} steps on another model, other data or "
                f"other rows than now ({self.total_steps} steps); give the same files and options, "
                f"{cure}"
            )


def _trajectory(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine the losses of a run."""
    free = resumable_names(type(config))
    return {name: value for name, value in config.to_dict().items() if name not in free}
