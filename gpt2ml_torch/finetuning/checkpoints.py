"""Folders of checkpoints: each appears under its name only when it is complete and on the disk.

Written and read through `torch.distributed.checkpoint`, also by a single process, so that a run may
go on with another number of processes than it began with.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gpt2ml_torch.finetuning.processes import barrier, process_rank

_PROGRESS = "progress.json"
_PREFIX = "step-"
_PARTIAL = ".partial"


class CheckpointFolder:
    """The checkpoints of one run: the last `keep`, and the best.

    `save` raises `OSError` where a checkpoint can't be written; those before it stay as they were.
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
            self._sweep()
            for step in self.steps():
                self._delete(step)
        barrier()

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> Path:
        """Write one checkpoint; `progress` is JSON, and its `best_step` names one to keep."""
        target = self.at(step)
        partial = target.with_name(target.name + _PARTIAL)
        try:
            if process_rank() == 0:
                self._sweep()
                partial.mkdir(parents=True)
            barrier()
            _write_tensors(partial, tensors)
            if process_rank() == 0:
                _write_synced(partial / _PROGRESS, json.dumps(progress, ensure_ascii=False))
                sync_folder(partial)
                shutil.rmtree(target, ignore_errors=True)  # one that was damaged
                partial.rename(target)
                sync_folder(self.path)
                self._prune(progress.get("best_step"))
            barrier()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                error.errno or errno.EIO,
                f"can't write the checkpoint {target}: {error.strerror or error}",
            ) from error
        return target

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for leftover in self.path.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Under a name that is no checkpoint's, since a kill may leave half of it."""
        doomed = self.at(step).with_name(self.at(step).name + _PARTIAL)
        self.at(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_progress(folder: Path) -> dict[str, Any]:
    """What `save` was given as `progress`; raises `ValueError` for a damaged checkpoint."""
    try:
        return dict(json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(
            f"{folder} is damaged: {_PROGRESS} is not JSON; delete the folder"
        ) from None


def load_tensors_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint's tensors into these ones, whose names and shapes must be in it.

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
        raise _os_error_in(error) from error
    except RuntimeError as error:  # what torch's own file writer makes of a full disk
        raise OSError(errno.ENOSPC, f"is the disk full? {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _os_error_in(error: CheckpointException) -> OSError:
    for failure in error.failures.values():
        if isinstance(failure[0], OSError):
            return failure[0]
    return OSError(errno.EIO, _first_line(error))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a folder's entries survive a loss of power, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
