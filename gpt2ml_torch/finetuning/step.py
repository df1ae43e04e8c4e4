"""One optimizer step: forward, backward and update, with checks of the loss and the gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.finetuning.distributed import process_count, total
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import SlicedOptimizer, StepInBackward, gradient_norm
from gpt2ml_torch.finetuning.train_config import TrainConfig

_MEMORY = 0.98  # decay of the running mean and variance
_WARM = 20  # steps before spikes are detected
_LEAST = 1.0  # nats above the mean; a smaller jump is never a spike


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of one step."""

    loss: float  # nats a token, the mean over all processes
    learned: int  # number of tokens in that mean
    gradient_norm: float | None  # None if there was no backward pass
    trouble: str | None  # why the step was rejected, if it was


class Stepper:
    """Updates the trainable weights of an objective, in the backward pass or after it.

    A step is rejected if its loss is not finite or is a spike (`LossWatch`), or if a gradient is
    not finite. If updates happen inside the backward pass, the layers above the faulty gradient
    have already been updated by then.
    """

    def __init__(
        self, objective: Objective, optimizer: SlicedOptimizer, config: TrainConfig
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.watch = LossWatch(factor=config.spike_factor)
        self._clip_norm = config.clip_norm
        self._in_backward = StepInBackward(optimizer) if config.step_in_backward else None

    def step(self, batches: Sequence[Rows], learning_rate: float) -> StepResult:
        """Take one step over these batches; a group's `scale` multiplies the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("scale", 1.0)
        learned = int(total(sum(learned_tokens(batch) for batch in batches)))
        loss, trouble = self._forward_backward(batches, learned)
        if trouble is not None:
            self.optimizer.zero_grad(set_to_none=True)
            return StepResult(loss, learned, None, trouble)
        norm = self._in_backward.gradient_norm if self._in_backward else self._apply()
        broken = self._in_backward.broken if self._in_backward else not math.isfinite(norm)
        self.watch.add(loss)
        return StepResult(loss, learned, norm, "a gradient is not finite" if broken else None)

    def _forward_backward(self, batches: Sequence[Rows], learned: int) -> tuple[float, str | None]:
        """Return the mean loss, and the reason to reject it, if any."""
        self.objective.train()
        if self._in_backward:
            self._in_backward.reset()
        loss = 0.0
        for batch in batches:
            part = self.objective(batch) / max(1, learned)
            loss += total(float(part.detach()))
            if trouble := self.watch.trouble(loss):
                return loss, trouble
            # Sharding averages gradients over the processes; the loss is a sum.
            (part * process_count()).backward()
        return loss, None

    def _apply(self) -> float:
        """Clip the accumulated gradients and step; return their norm before clipping."""
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = gradient_norm(gradients)
        if math.isfinite(norm):
            if self._clip_norm is not None and norm > self._clip_norm:
                for gradient in gradients:
                    gradient.mul_(self._clip_norm / norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self) -> None:
        """Remove the hooks from the weights."""
        if self._in_backward:
            self._in_backward.remove()


class LossWatch:
    """Tracks mean and standard deviation of the loss, and detects spikes.

    A spike lies more than `factor` standard deviations, and more than 1 nat, above the mean.
    """

    def __init__(self, *, factor: float) -> None:
        self.factor = factor
        self._mean = 0.0
        self._variance = 0.0
        self._count = 0

    def trouble(self, loss: float) -> str | None:
        """The reason to reject this loss, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._mean + max(_LEAST, self.factor * math.sqrt(self._variance))
        if self._count >= _WARM and loss > limit:
            return f"the loss jumped to {loss:.3f}, from {self._mean:.3f} on average"
        return None

    def add(self, loss: float) -> None:
        """Add an accepted loss to the statistics."""
        self._count += 1
        keep = min(_MEMORY, 1 - 1 / self._count)
        difference = loss - self._mean
        self._mean += (1 - keep) * difference
        self._variance = keep * (self._variance + (1 - keep) * difference**2)

    def state(self) -> list[float]:
        """The statistics as JSON types."""
        return [self._mean, self._variance, self._count]

    def restore(self, state: list[float]) -> None:
        """Restore the statistics from `state`."""
        self._mean, self._variance = state[0], state[1]
        self._count = int(state[2])


def learned_tokens(rows: Rows) -> int:
    """The number of targets in this process's rows."""
    return int((rows.labels != 0).sum())
