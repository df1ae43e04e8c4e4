"""The training loop: steps, evaluations, samples and checkpoints.

It prints nothing; callbacks receive events (`finetuning.events`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder, RunState, Snapshots
from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.finetuning.distributed import process_rank, total
from gpt2ml_torch.finetuning.events import (
    Callback,
    CheckpointSaved,
    Evaluated,
    Event,
    PromptContinued,
    RunEnded,
    RunStarted,
    StepSkipped,
    StepTaken,
)
from gpt2ml_torch.finetuning.memory import used_gib
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import SlicedOptimizer
from gpt2ml_torch.finetuning.optimizers.sliced import local
from gpt2ml_torch.finetuning.reporting import MetricsFile, draw_losses
from gpt2ml_torch.finetuning.step import Stepper, learned_tokens
from gpt2ml_torch.finetuning.train_config import TrainConfig

Sampler = Callable[[Sequence[str]], Sequence[str]]

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """Batches in a fixed order, the same in each run, such as a `BatchStream`."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""

    def batch(self, index: int) -> Rows:
        """This process's rows of the index-th batch of the run."""


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


class Trainer:
    """One training run of one model.

    `objective` computes the loss. `optimizer` holds its trainable parameters, whose groups may have
    a `scale` of the learning rate. Each call of `valid_batches` gives the validation rows;
    `valid_characters` is the number of characters predicted in them. `folder` receives
    checkpoints/, metrics.jsonl and loss.png; without it nothing is written. `should_stop` is called
    after each step. `data_key` identifies model and data, so that a run is not resumed on others.

    The run seeds PyTorch's global random numbers, from which dropout draws. Raises `ValueError`
    when resuming with other settings, and `OSError` if a file can't be written.
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
        self.sampler = sampler
        self.should_stop = should_stop or (lambda: False)
        self.steps_per_epoch = max(1, -(-batches.steps_per_epoch // config.accumulate))
        self.total_steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))
        self.eval_every = config.eval_every or -(-self.total_steps // 10)
        self.stepper = Stepper(objective, optimizer, config)
        self.snapshots: Snapshots | None = None
        if folder is not None:
            self.snapshots = Snapshots(
                CheckpointFolder(folder / "checkpoints", keep=config.keep),
                self.stepper,
                config,
                total_steps=self.total_steps,
                data_key=data_key,
            )
        self._callbacks = [callback] if callback else []
        self._state = RunState()
        self._losses: list[float] = []
        self._saved_at = time.monotonic()
        self._device = objective.model.device

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end, or until told to stop; `resume` continues from the last checkpoint."""
        torch.manual_seed(self.config.seed + process_rank())
        restored = self.snapshots.restore() if self.snapshots and resume else None
        if restored:
            self._state = restored
        elif self.snapshots:
            self.snapshots.folder.clear()
        with self._recording(restored is not None):
            try:
                return self._run()
            finally:
                self.stepper.close()

    def _run(self) -> TrainResult:
        fresh = not self.optimizer.state
        self.optimizer.allocate()
        self._emit(
            RunStarted(
                step=self._state.step,
                total_steps=self.total_steps,
                fresh_optimizer=fresh,
                **self._counts(),
            )
        )
        if self._state.step == 0 and self.valid_batches:
            self._evaluate()
        reason, trouble = "done", None
        while self._state.step < self.total_steps:
            if self._impatient():
                reason = "early stop"
                break
            trouble = self._step()
            if trouble is not None:
                return self._end("spike", trouble)
            self._after_step()
            if _any_process(self.should_stop()):
                reason = "interrupted"
                break
        self._save()
        return self._end(reason)

    def _step(self) -> str | None:
        """Take one optimizer step; return a reason if the run must stop."""
        started = time.perf_counter()
        state, config = self._state, self.config
        first = state.step * config.accumulate
        batches = [self.batches.batch(first + i).to(self._device) for i in range(config.accumulate)]
        rate = config.learning_rate_at(state.step, self.total_steps)
        result = self.stepper.step(batches, rate)
        if result.trouble is not None:
            at = state.step
            self._emit(StepSkipped(step=at, loss=result.loss, reason=result.trouble, at=at))
            if config.on_spike == "stop":
                return result.trouble
        state.step += 1
        state.tokens += result.learned
        self._losses.append(result.loss)
        if result.trouble is None:
            read = total(float(sum(int((b.document_ids != 0).sum()) for b in batches)))
            seconds = time.perf_counter() - started
            self._emit(
                StepTaken(
                    step=state.step,
                    loss=result.loss,
                    learning_rate=rate,
                    gradient_norm=result.gradient_norm,
                    tokens=state.tokens,
                    seconds=round(seconds, 4),
                    tokens_per_second=round(read / seconds, 2),
                    memory_gib=round(used_gib(self._device), 3),
                )
            )
        return None

    def _after_step(self) -> None:
        """Evaluate, write samples and save a checkpoint, each when it is due."""
        config, step = self.config, self._state.step
        last = step == self.total_steps
        if self.valid_batches and (step % self.eval_every == 0 or last):
            self._evaluate()
        if self.sampler and (step % (config.sample_every or self.eval_every) == 0 or last):
            self._sample()
        late = time.monotonic() - self._saved_at > 60 * config.checkpoint_minutes
        if step % (config.checkpoint_every or self.eval_every) == 0 or _any_process(late):
            self._save()

    # -- evaluation -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats a token), perplexity and bits a character of the validation batches."""
        assert self.valid_batches is not None
        self.objective.eval()
        summed, learned = 0.0, 0.0
        for batch in self.valid_batches():
            summed += total(float(self.objective(batch.to(self._device))))
            learned += total(float(learned_tokens(batch)))
        loss = summed / max(1.0, learned)
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.valid_characters:
            result["bits_per_character"] = summed / math.log(2) / self.valid_characters
        return result

    def _evaluate(self) -> None:
        state = self._state
        result = self.evaluate()
        better = math.isfinite(result["loss"]) and (
            state.best_loss is None or result["loss"] < state.best_loss
        )
        if better:
            state.best_loss, state.best_step = result["loss"], state.step
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        self._emit(Evaluated(step=state.step, best=better, **result))
        if better and state.step:
            self._save()

    def _impatient(self) -> bool:
        patience = self.config.patience
        return patience is not None and self._state.evaluations_since_best >= patience

    def _sample(self) -> None:
        assert self.sampler is not None
        self.objective.eval()
        # Decoding has other shapes, for which compiled blocks would be compiled again.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(), torch.no_grad(), eagerly:
            texts = self.sampler(self.config.prompts)
        for prompt, text in zip(self.config.prompts, texts, strict=True):
            self._emit(PromptContinued(step=self._state.step, prompt=prompt, text=text))

    def _save(self) -> None:
        if self.snapshots and self.snapshots.saved_step != self._state.step:
            path = self.snapshots.save(self._state)
            self._saved_at = time.monotonic()
            self._emit(CheckpointSaved(step=self._state.step, path=str(path)))

    def restore_best(self) -> None:
        """Restore the weights with the lowest validation loss, unless they are the last ones."""
        best = self._state.best_step
        if self.snapshots and best and best != self._state.step:
            self.snapshots.restore_weights(best)

    # -- events -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording(self, goes_on: bool) -> Iterator[None]:
        """Write metrics.jsonl during the run, and loss.png when it ends in any way."""
        if self.folder is None or process_rank() > 0:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        metrics = MetricsFile(path, resume_after=self._state.step if goes_on else None)
        self._callbacks.insert(0, metrics)
        try:
            yield
        finally:
            try:
                metrics.close()
                draw_losses(path, self.folder / "loss.png")
            except OSError as error:  # a full disk, which a checkpoint may have met already
                logger.warning("can't write into %s: %s", self.folder, error.strerror)

    def _emit(self, event: Event) -> None:
        if process_rank() == 0:
            for callback in self._callbacks:
                callback(event)

    def _counts(self) -> dict[str, int]:
        parameters = list(self.objective.parameters())
        slots = [slot for state in self.optimizer.state.values() for slot in state.values()]
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "weights_here": sum(local(p).numel() for p in parameters),
            "slots_here": sum(local(slot).numel() for slot in slots),
        }

    def _end(self, reason: str, trouble: str | None = None) -> TrainResult:
        state = self._state
        self._emit(
            RunEnded(
                step=state.step,
                reason=reason,
                best_step=state.best_step,
                best_loss=state.best_loss,
            )
        )
        return TrainResult(
            reason=reason,
            step=state.step,
            total_steps=self.total_steps,
            best_step=state.best_step,
            best_loss=state.best_loss,
            last_checkpoint=self.snapshots.folder.latest() if self.snapshots else None,
            trouble=trouble,
            losses=self._losses,
        )


def _any_process(condition: bool) -> bool:
    """Whether the condition holds in any process, so that all of them act alike."""
    return total(float(condition)) > 0
