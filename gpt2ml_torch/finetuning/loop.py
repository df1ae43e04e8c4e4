"""The training loop: steps, evaluations, checkpoints, resuming; told what happens by events,
printing nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2ml_torch.finetuning.checkpoints import (
    CheckpointFolder,
    load_tensors_into,
    read_progress,
    state_tensors,
)
from gpt2ml_torch.finetuning.config import TrainConfig
from gpt2ml_torch.finetuning.data import Rows
from gpt2ml_torch.finetuning.memory import used_gib
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import (
    SlicedOptimizer,
    StepInBackward,
    gradient_norm,
    local,
)
from gpt2ml_torch.finetuning.reporting import Callback, Event, MetricsFile, draw_losses
from gpt2ml_torch.finetuning.spikes import LossWatch

Sampler = Callable[[Sequence[str]], Sequence[str]]


class Batches(Protocol):
    """What the loop reads: rows in an order that is the same in each run; `data.BatchStream` is
    one.

    A place counts the rows of all processes together.
    """

    batch_size: int  # rows of this process in a batch

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""

    def batch_at(self, place: int) -> Rows:
        """This process's rows of the batch that begins at a place."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: `reason` is "done", "early stop", "interrupted" or "spike"."""

    reason: str
    step: int
    total_steps: int
    best_step: int | None
    best_loss: float | None
    last_checkpoint: Path | None
    trouble: str | None  # why it stopped after a spike
    losses: list[float] = dataclasses.field(repr=False)


@dataclasses.dataclass
class _Progress:
    """What changes from step to step beside weights and optimizer; JSON in each checkpoint."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    last_evaluation: int = -1


class Trainer:
    """One training run of one model.

    `objective` computes the loss, `optimizer` has its trainable parameters, whose groups may carry
    a `scale` of the learning
    rate. `folder` receives checkpoints/, metrics.jsonl and loss.png; without one nothing is
    written. `should_stop` is asked after
    each step; `data_key` names the data, so that a run is not resumed on others. Raises
    `ValueError` on resuming with other settings, and `OSError` where a file can't be written.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: SlicedOptimizer,
        batches: Batches,
        config: TrainConfig,
        *,
        valid_batches: Callable[[], Iterable[Rows]] | None = None,
        valid_characters: int | None = None,
        folder: Path | None = None,
        data_key: str | None = None,
        sampler: Sampler | None = None,
        callback: Callback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.batches = batches
        self.config = config
        self.valid_batches = valid_batches
        self.valid_characters = valid_characters
        self.folder = folder
        self.data_key = data_key
        self.sampler = sampler
        self.should_stop = should_stop or (lambda: False)
        self.steps_per_epoch = max(1, -(-batches.steps_per_epoch // config.accumulate))
        self.total_steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))
        self.checkpoints = (
            CheckpointFolder(folder / "checkpoints", keep=config.keep) if folder else None
        )
        self._callbacks = [callback] if callback else []
        self._progress = _Progress()
        self._watch = LossWatch(factor=config.spike_factor)
        self._fused = StepInBackward(optimizer) if config.step_in_backward else None
        self._losses: list[float] = []
        self._trouble: str | None = None
        self._device = next(objective.parameters()).device

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end, or until told to stop."""
        torch.manual_seed(self.config.seed + _rank())
        if resume:
            self._resume()
        elif self.checkpoints:
            self.checkpoints.clear()
        with self._recording(resume):
            try:
                return self._run()
            finally:
                if self._fused:
                    self._fused.remove()

    def _run(self) -> TrainResult:
        self.optimizer.allocate()
        self._emit("start", total_steps=self.total_steps, **self._counts())
        if self._progress.step == 0 and self.valid_batches:
            self._evaluate()
        reason = "done"
        while self._progress.step < self.total_steps:
            if not self._step():
                return self._end("spike")
            self._after_step()
            if self._impatient():
                reason = "early stop"
                break
            if self._told_to_stop():
                reason = "interrupted"
                break
        if self.checkpoints and self.checkpoints.latest() != self.checkpoints.at(
            self._progress.step
        ):
            self._save()
        return self._end(reason)

    def _after_step(self) -> None:
        config, step = self.config, self._progress.step
        evaluate_every = config.eval_every or self.steps_per_epoch
        last = step == self.total_steps
        if self.valid_batches and (step % evaluate_every == 0 or last):
            self._evaluate()
        if self.sampler and (step % (config.sample_every or evaluate_every) == 0 or last):
            self._sample()
        if step % (config.checkpoint_every or evaluate_every) == 0:
            self._save()

    # -- one step ---------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One optimizer step; False if the run must stop."""
        started = time.perf_counter()
        progress, config = self._progress, self.config
        rows = self.batches.batch_size * _world()
        first = progress.step * config.accumulate * rows
        batches = [
            self.batches.batch_at(first + i * rows).to(self._device)
            for i in range(config.accumulate)
        ]
        rate = config.learning_rate_at(progress.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        loss, learned, trouble = self._forward_backward(batches)
        norm = None
        if trouble is None:
            norm, trouble = self._apply()
        if trouble is not None:
            self._emit("skip", loss=loss, reason=trouble, at=progress.step)
            if config.on_spike == "stop":
                self._trouble = trouble
                return False
        progress.step += 1
        progress.tokens += learned
        self._losses.append(loss)
        if trouble is None:
            seconds = time.perf_counter() - started
            self._emit(
                "step",
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=progress.tokens,
                seconds=round(seconds, 4),
                tokens_per_second=round(
                    sum(b.token_ids.numel() for b in batches) * _world() / seconds, 2
                ),
                memory_gib=round(used_gib(self._device), 3),
            )
        return True

    def _forward_backward(self, batches: list[Rows]) -> tuple[float, int, str | None]:
        """The mean loss, the tokens it is of, and what is wrong with it."""
        self.objective.train()
        learned = int(_total(float(sum(_learned(batch) for batch in batches))))
        if self._fused:
            self._fused.reset()
        loss = 0.0
        for batch in batches:
            part = self.objective(batch) / max(1, learned)
            loss += _total(float(part.detach()))
            if trouble := self._watch.trouble(loss):
                self.optimizer.zero_grad(set_to_none=True)
                return loss, learned, trouble
            # Sharding averages gradients over the processes; the loss is a sum.
            (part * _world()).backward()
        self._watch.add(loss)
        return loss, learned, None

    def _apply(self) -> tuple[float, str | None]:
        """Step the weights, unless the backward pass did; gives the norm of the gradients."""
        if self._fused:
            trouble = "a gradient is not finite" if self._fused.broken else None
            return self._fused.gradient_norm, trouble
        gradients = [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = gradient_norm(gradients)
        if math.isfinite(norm):
            limit = self.config.clip_norm
            if limit is not None and norm > limit:
                for gradient in gradients:
                    gradient.mul_(limit / norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, None if math.isfinite(norm) else "a gradient is not finite"

    # -- evaluation -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats a token), perplexity and bits a character of the validation batches."""
        assert self.valid_batches is not None
        self.objective.eval()
        total, learned = 0.0, 0.0
        for batch in self.valid_batches():
            total += _total(float(self.objective(batch.to(self._device))))
            learned += _total(float(_learned(batch)))
        loss = total / max(1.0, learned)
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.valid_characters:
            result["bits_per_character"] = total / math.log(2) / self.valid_characters
        return result

    def _evaluate(self) -> None:
        progress = self._progress
        result = self.evaluate()
        better = progress.best_loss is None or result["loss"] < progress.best_loss
        if better:
            progress.best_loss, progress.best_step = result["loss"], progress.step
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        self._emit("eval", best=better, **result)
        if better and progress.step and self.checkpoints:
            self._save()

    def _impatient(self) -> bool:
        patience = self.config.patience
        return patience is not None and self._progress.evaluations_since_best >= patience

    def _sample(self) -> None:
        assert self.sampler is not None
        self.objective.eval()
        with torch.random.fork_rng(), torch.no_grad():
            texts = self.sampler(self.config.prompts)
        for prompt, text in zip(self.config.prompts, texts, strict=True):
            self._emit("sample", prompt=prompt, text=text)

    # -- checkpoints ------------------------------------------------------------------------------

    def _tensors(self, *, with_random: bool = True) -> dict[str, Tensor]:
        tensors = state_tensors(self.objective, self.optimizer)
        if with_random:
            prefix = f"random.{_rank()}"
            tensors[f"{prefix}.torch"] = torch.get_rng_state()
            tensors[f"{prefix}.rounding"] = self.optimizer.rounding_state
            if self._device.type == "cuda":
                tensors[f"{prefix}.cuda"] = torch.cuda.get_rng_state(self._device)
        return tensors

    def _save(self) -> None:
        if self.checkpoints is None or self.checkpoints.at(self._progress.step).exists():
            return
        progress = dataclasses.asdict(self._progress) | {
            "watch": self._watch.state(),
            "processes": _world(),
            "total_steps": self.total_steps,
            "data": self.data_key,
            "config": trajectory(self.config),
        }
        path = self.checkpoints.save(self._progress.step, self._tensors(), progress)
        self._emit("checkpoint", path=str(path))

    def _resume(self) -> None:
        path = self.checkpoints.latest() if self.checkpoints else None
        if path is None:
            return
        progress = read_progress(path)
        self._check_same_run(path, progress)
        self.optimizer.allocate()
        same_processes = progress["processes"] == _world()
        tensors = self._tensors(with_random=same_processes)
        load_tensors_into(path, tensors)
        if same_processes:
            self._set_random(tensors)
        else:
            torch.manual_seed(self.config.seed + 1_000_003 * progress["step"] + _rank())
        fields = [field.name for field in dataclasses.fields(_Progress)]
        self._progress = _Progress(**{name: progress[name] for name in fields})
        self._watch.restore(progress["watch"])

    def _set_random(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"random.{_rank()}"
        torch.set_rng_state(tensors[f"{prefix}.torch"])
        self.optimizer.rounding_state = tensors[f"{prefix}.rounding"]
        if f"{prefix}.cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{prefix}.cuda"], self._device)

    def _check_same_run(self, path: Path, progress: dict[str, Any]) -> None:
        before, now = progress["config"], trajectory(self.config)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path} was made with {name} {before.get(name)!r}, now it is "
                f"{now[name]!r}; resume with the same "
                "settings, or start a new run in another folder"
            )
        found = progress["data"], progress["total_steps"]
        if found != (self.data_key, self.total_steps):
            raise ValueError(
                f"{path} is of a run of {found[1]} steps on other data or rows than now "
                f"({self.total_steps} steps); give "
                "the same files and options, or start a new run in another folder"
            )

    # -- telling ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording(self, resume: bool) -> Iterator[None]:
        if self.folder is None or _rank() > 0:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        metrics = MetricsFile(path, resume_after=self._progress.step if resume else None)
        self._callbacks.insert(0, metrics)
        try:
            yield
        finally:
            metrics.close()
            draw_losses(path, self.folder / "loss.png")

    def _emit(self, kind: str, **values: Any) -> None:
        if _rank() == 0:
            for callback in self._callbacks:
                callback(Event(kind, self._progress.step, values))

    def _counts(self) -> dict[str, int]:
        parameters = list(self.objective.parameters())
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "weights_here": sum(local(p).numel() for p in parameters),
            "slots_here": sum(
                local(slot).numel()
                for state in self.optimizer.state.values()
                for slot in state.values()
            ),
        }

    def _told_to_stop(self) -> bool:
        return _total(float(self.should_stop())) > 0

    def _end(self, reason: str) -> TrainResult:
        progress = self._progress
        last = self.checkpoints.latest() if self.checkpoints else None
        self._emit("end", reason=reason, best_step=progress.best_step, best_loss=progress.best_loss)
        return TrainResult(
            reason=reason,
            step=progress.step,
            total_steps=self.total_steps,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            last_checkpoint=last,
            trouble=self._trouble,
            losses=self._losses,
        )


# What may differ between a run and its continuation.
_FREE = frozenset(
    [
        "keep",
        "prompts",
        "sample_every",
        "sample_tokens",
        "tensorboard",
        "resume",
        "overwrite",
        "cache",
        "folder",
        "out",
        "loss_chunk",
        "device",
        "compile",
        "on_spike",
        "data",
        "valid",
        "model",
        "gradient_checkpointing",
    ]
)


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the losses of a run."""
    return {name: value for name, value in config.to_dict().items() if name not in _FREE}


def _learned(rows: Rows) -> int:
    return int((rows.labels != 0).sum())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _total(value: float) -> float:
    """The sum over all processes."""
    if _world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)
