"""Options of training, each stated once at its field and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from gpt2ml_torch.options import OptionError, check_options, option

OPTIMIZERS = ("adafactor", "adamw", "adamw8bit")
TRAINING_PRECISIONS = ("bfloat16", "float32", "mixed")
SCHEDULES = ("cosine", "linear", "constant")
LORA_TARGETS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
LORA_BASES = ("weights", "int8", "int4")
ON_SPIKE = ("stop", "skip")

# Low on purpose: the published models were trained at 1e-4, and people report that text gets worse
# after tuning.
FULL_LEARNING_RATE = 1e-5
LORA_LEARNING_RATE = 1e-4

# Limits on sizes; whether the machine has the memory is checked separately.
MANY = 10**9
_MOST_ROWS = 1 << 30
_MOST_BATCHES = 1 << 16


def training_option(default: Any, help: str, **details: Any) -> Any:
    return option(default, help=help, group="training", **details)


def _adapter(default: Any, help: str, **details: Any) -> Any:
    return option(default, help=help, group="LoRA adapter", **details)


def memory_option(default: Any, help: str, **details: Any) -> Any:
    return option(default, help=help, group="memory and speed", **details)


def run_option(default: Any, help: str, **details: Any) -> Any:
    return option(default, help=help, group="the run", **details)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: every option except the model and the data.

    Durations are in optimizer steps. Raises `ValueError` for values out of range and for
    settings that exclude each other.
    """

    epochs: float = training_option(1.0, "passes over the data", above=0, high=1e6)
    steps: int | None = training_option(
        None, "optimizer steps, instead of epochs", low=1, high=MANY, metavar="STEPS"
    )
    batch_size: int = training_option(
        1,
        "rows in a batch, over all processes; under torchrun one for each process by default",
        low=1,
        high=_MOST_ROWS,
        metavar="ROWS",
    )
    accumulate: int = training_option(
        1, "batches in a step; needs kept gradients", low=1, high=_MOST_BATCHES, metavar="BATCHES"
    )
    optimizer: str = training_option(
        "adafactor",
        "adafactor trained the original and needs the least memory",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = training_option(
        None,
        "peak of the learning rate",
        low=0.0,
        high=1.0,
        flags=("--learning-rate", "--lr"),
        metavar="RATE",
        default_text="1e-5; for an adapter 1e-4",
    )
    schedule: str = training_option(
        "cosine", "how the learning rate falls after the warm-up", choices=SCHEDULES
    )
    warmup: int | None = training_option(
        None,
        "steps over which the learning rate rises",
        low=0,
        high=MANY,
        metavar="STEPS",
        default_text="5 % of the run",
    )
    cooldown: int = training_option(
        0,
        "last steps, over which a constant learning rate falls",
        low=0,
        high=MANY,
        metavar="STEPS",
    )
    final_share: float = training_option(
        0.1, "share of the peak at which the learning rate ends", low=0.0, high=1.0, metavar="SHARE"
    )
    weight_decay: float = training_option(
        0.01, "decoupled weight decay of matrices", low=0.0, high=1.0
    )
    clip_norm: float | None = training_option(
        None, "clip the norm of all gradients; needs kept gradients", above=0, metavar="NORM"
    )
    dropout: float | None = training_option(
        None, "dropout probability", low=0.0, high=0.999, default_text="the model's, usually 0.1"
    )
    layer_decay: float = training_option(
        1.0, "factor of the learning rate from each block to the one below", above=0, high=1.0
    )
    train_layers: str | None = training_option(
        None,
        'blocks to train, such as "last:12", "24-47" or "0,1,47"',
        metavar="WHICH",
        default_text="all",
    )
    freeze_embeddings: bool = training_option(
        False, "don't train the two embeddings", flags="--freeze-embeddings"
    )

    lora_rank: int = _adapter(
        0, "train an adapter of this rank; 0 trains the weights", low=0, metavar="RANK"
    )
    lora_alpha: float | None = _adapter(
        None,
        "scale of the adapter, divided by its rank",
        above=0,
        high=1e6,
        metavar="ALPHA",
        default_text="twice the rank",
    )
    lora_targets: tuple[str, ...] = _adapter(
        LORA_TARGETS,
        "linear layers that get an adapter",
        choices=LORA_TARGETS,
        split=",",
        metavar="NAMES",
    )
    lora_dropout: float = _adapter(0.0, "dropout before the adapter", low=0.0, high=0.999)
    lora_base: str = _adapter(
        "weights",
        "precision of the frozen matrices; weights leaves them as they are",
        choices=LORA_BASES,
    )

    precision: str = memory_option(
        "bfloat16",
        "precision of the weights; mixed keeps float32 weights and computes in bfloat16",
        choices=TRAINING_PRECISIONS,
    )
    step_in_backward: bool = memory_option(
        True,
        "keep all gradients and step after the backward pass, not inside it",
        flags="--keep-gradients",
        inverted=True,
    )
    stochastic_rounding: bool = memory_option(
        True,
        "round bfloat16 weights to nearest, which loses small updates",
        flags="--round-to-nearest",
        inverted=True,
    )
    gradient_checkpointing: bool = memory_option(
        True,
        "keep all activations instead of computing blocks twice",
        flags="--no-gradient-checkpointing",
        inverted=True,
        resumable=True,
    )
    loss_chunk: int = memory_option(
        128,
        "positions whose logits are in memory at once",
        low=1,
        high=MANY,
        metavar="POSITIONS",
        resumable=True,
    )
    upcast: bool | None = memory_option(
        None,
        "multiply bfloat16 weights in float32",
        default_text="on CPUs without bfloat16 instructions",
    )
    compile: bool | None = memory_option(
        None, "compile the blocks", default_text="on CUDA", resumable=True
    )

    seed: int = run_option(
        0, "seed of the order of rows, dropout and rounding", low=0, high=(1 << 63) - 1
    )
    eval_every: int | None = run_option(
        None,
        "steps from one evaluation to the next",
        low=1,
        high=MANY,
        metavar="STEPS",
        default_text="a tenth of the run",
    )
    patience: int | None = run_option(
        None,
        "stop after this many evaluations without improvement",
        low=1,
        high=MANY,
        metavar="EVALUATIONS",
        default_text="never",
    )
    prompts: tuple[str, ...] = run_option(
        (),
        "prompt that the model continues during training",
        flags="--prompt",
        resumable=True,
        metavar="TEXT",
    )
    sample_every: int | None = run_option(
        None,
        "steps from one continuation to the next",
        low=1,
        high=MANY,
        metavar="STEPS",
        default_text="with each evaluation",
        resumable=True,
    )
    sample_tokens: int = run_option(
        64, "length of a continuation", low=1, high=_MOST_BATCHES, metavar="TOKENS", resumable=True
    )
    checkpoint_every: int | None = run_option(
        None,
        "steps from one checkpoint to the next",
        low=1,
        high=MANY,
        metavar="STEPS",
        default_text="with each evaluation",
        resumable=True,
    )
    checkpoint_minutes: float = run_option(
        15.0,
        "longest time from one checkpoint to the next",
        low=0.0,
        metavar="MINUTES",
        resumable=True,
    )
    keep: int = run_option(
        2,
        "last checkpoints to keep, beside the best",
        low=1,
        high=MANY,
        metavar="CHECKPOINTS",
        resumable=True,
    )
    on_spike: str = run_option(
        "stop", "what to do if the loss jumps up in a step", choices=ON_SPIKE, resumable=True
    )
    spike_factor: float = run_option(
        6.0, "standard deviations above the mean loss that make a spike", low=1.0, metavar="FACTOR"
    )
    tensorboard: bool = run_option(
        False, "write the curves for TensorBoard too", flags="--tensorboard", resumable=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.lora_targets:
            raise OptionError("{lora_targets} is empty; expected some of {}", _names(LORA_TARGETS))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.step_in_backward and self.accumulate > 1:
            raise OptionError(
                "{accumulate} is {}, which needs kept gradients, and the step inside the backward "
                "pass frees them; use {batch_size} {} or {step_in_backward=False}",
                self.accumulate,
                self.batch_size * self.accumulate,
            )
        if self.step_in_backward and self.clip_norm is not None:
            raise OptionError(
                "{clip_norm} needs all gradients at once, and the step inside the backward pass "
                "frees each as it comes; leave it out (adafactor clips each update by itself), or "
                "use {step_in_backward=False}"
            )
        if self.upcast and self.precision != "bfloat16":
            raise OptionError(
                "{upcast} concerns bfloat16 weights; with {precision} {} leave it out",
                self.precision,
            )
        if self.cooldown and self.schedule != "constant":
            raise OptionError(
                "{cooldown} ends a constant {schedule}, and {} falls by itself; leave one of them "
                "out",
                self.schedule,
            )
        self._check_adapter()

    def _check_adapter(self) -> None:
        if self.lora_base != "weights" and not self.lora_rank:
            raise OptionError(
                "{lora_base} is {}, and without an adapter nothing would be trained; set "
                "{lora_rank}",
                self.lora_base,
            )
        if not self.lora_rank:
            return
        for field, default in (
            ("train_layers", None),
            ("layer_decay", 1.0),
            ("freeze_embeddings", False),
        ):
            if getattr(self, field) != default:
                raise OptionError(
                    "{" + field + "} concerns full fine-tuning, and with {lora_rank} {} the "
                    "model's own weights are frozen; leave one of them out",
                    self.lora_rank,
                )

    @property
    def learning_rate_used(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LORA_LEARNING_RATE if self.lora_rank else FULL_LEARNING_RATE

    def learning_rate_at(self, step: int, total: int) -> float:
        """The learning rate of step 0..total-1: linear warm-up, then the schedule to its end."""
        warmup = self.warmup if self.warmup is not None else total // 20
        peak = self.learning_rate_used
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.schedule == "constant":
            left = min(1.0, (total - step) / self.cooldown) if self.cooldown else 1.0
        else:
            done = (step - warmup) / max(1, total - warmup)
            left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return peak * (self.final_share + (1 - self.final_share) * left)

    def trains_layer(self, layer: int, layers: int) -> bool:
        """Whether block `layer` of `layers` is trained."""
        return self.train_layers is None or layer in parse_layers(self.train_layers, layers)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        values = dataclasses.asdict(self)
        return {name: _to_json(value) for name, value in values.items()}


def parse_layers(text: str, layers: int) -> set[int]:
    """Which of `layers` blocks "last:12", "first:2", "24-47" or "0,1,47" means.

    Raises `ValueError` for anything else.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        numbers = _range_of(part, layers)
        if numbers is None or not numbers:
            raise _layers_error(text, layers, "")
        for end in (numbers[0], numbers[-1]):  # before iterating over a range of any length
            if not 0 <= end < layers:
                raise _layers_error(text, layers, f", which names block {end}")
        chosen.update(numbers)
    return chosen


def _range_of(part: str, layers: int) -> range | None:
    """The blocks that one part of `train_layers` names; None if it is malformed."""
    if match := re.fullmatch(r"(last|first):(\d{1,18})", part):
        count = int(match[2])
        return range(layers - count, layers) if match[1] == "last" else range(count)
    if match := re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part):
        return range(int(match[1]), int(match[2] or match[1]) + 1)
    return None


def _layers_error(text: str, layers: int, detail: str) -> OptionError:
    return OptionError(
        '{train_layers} is {!r}{}; expected "last:N", "first:N", "A-B" or "A,B,C" within 0 to {}',
        text if len(text) <= 60 else f"{text[:57]}...",
        detail,
        layers - 1,
    )


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _to_json(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
