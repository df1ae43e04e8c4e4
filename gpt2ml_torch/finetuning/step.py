"""One optimizer step: forward, backward, the update, and what can be wrong with any of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.finetuning.distributed import process_count, total
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import SlicedOptimizer, StepInBackward, gradient_norm
from gpt2ml_torch.finetuning.train_config import TrainConfig

_MEMORY = 0.98  # of the running mean and variance
_WARM = 20  # steps before a spike can be told from the ordinary
_LEAST = 1.0  # nats above the mean that are never called a spike


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What came of a step."""

    loss: float  # nats a token, the mean over all processes
    learned: int  # tokens it is the mean of
    gradient_norm: float | None  # None where no gradient was made
    trouble: str | None  # why nothing was learned, if so


class Stepper:
    """Steps the trainable weights of an objective: in the backward pass, or after it.

    A loss that is not finite or a spike (`watch`) is not learned from, nor is a gradient that is
    not finite; in the backward pass, though, weights above the one with that gradient are stepped
    already.
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
        """Learn from these batches together; groups may carry a `scale` of the learning rate."""
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
        """The mean loss, and what is wrong with it."""
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
        """Clip and step with the gradients that were kept; gives their norm before clipping."""
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
        """Take the hooks off the weights."""
        if self._in_backward:
            self._in_backward.remove()


class LossWatch:
    """Remembers the losses' mean and spread; a spike is `factor` deviations above the mean."""

    def __init__(self, *, factor: float) -> None:
        self.factor = factor
        self._mean = 0.0
        self._variance = 0.0
        self._count = 0

    def trouble(self, loss: float) -> str | None:
        """What is wrong with this loss, in words; None if nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._mean + max(_LEAST, self.factor * math.sqrt(self._variance))
        if self._count >= _WARM and loss > limit:
            return f"the loss jumped to {loss:.3f}, from {self._mean:.3f} on average"
        return None

    def add(self, loss: float) -> None:
        """Remember a good loss."""
        self._count += 1
        keep = min(_MEMORY, 1 - 1 / self._count)
        difference = loss - self._mean
        self._mean += (1 - keep) * difference
        self._variance = keep * (self._variance + (1 - keep) * difference**2)

    def state(self) -> list[float]:
        """All it remembers, as JSON."""
        return [self._mean, self._variance, self._count]

    def restore(self, state: list[float]) -> None:
        """Set what `state` gave."""
        self._mean, self._variance = state[0], state[1]
        self._count = int(state[2])


def learned_tokens(rows: Rows) -> int:
    """How many tokens of this process's rows are learned."""
    return int((rows.labels != 0).sum())
