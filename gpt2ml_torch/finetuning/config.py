"""The settings of a training run, checked once and together, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning.data.records import Fields

OPTIMIZERS = ("adafactor", "adamw", "adamw8bit")
PRECISIONS = ("bfloat16", "float32", "mixed")
SCHEDULES = ("cosine", "linear", "constant")
LORA_TARGETS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
LORA_BASES = ("weights", "int8", "int4")
ON_SPIKE = ("stop", "skip")

# Gentle on purpose: the published models were trained at 1e-4, and people report that text gets
# worse after tuning.
FULL_LEARNING_RATE = 1e-5
LORA_LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: all that does not say what model and what data.

    Lengths of time are optimizer steps. Raises `ValueError` for values out of range and for
    settings that exclude each other.
    """

    # How long. `epochs` counts passes over the rows; `steps`, if given, wins.
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 1  # rows over all processes; a step takes `accumulate` such batches
    accumulate: int = 1

    # The rule of the step.
    optimizer: str = "adafactor"
    step_in_backward: bool = True
    precision: str = "bfloat16"
    stochastic_rounding: bool = True
    learning_rate: float | None = None  # 1e-5, or 1e-4 for an adapter, if None
    schedule: str = "cosine"
    warmup: int | None = None  # 5 % of all steps, if None
    cooldown: int = 0  # last steps, over which a constant rate falls linearly
    final_share: float = 0.1  # of the learning rate, where cosine, linear and cooldown end
    weight_decay: float = 0.01
    clip_norm: float | None = None
    dropout: float | None = None  # the model's own, if None

    # What is trained.
    layer_decay: float = 1.0  # of the learning rate, from each layer to the one below
    train_layers: str | None = None  # "last:12", "24-47" or "0,1,47"
    freeze_embeddings: bool = False
    lora_rank: int = 0  # 0: no adapter, all weights are trained
    lora_alpha: float | None = None  # twice the rank, if None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_dropout: float = 0.0
    lora_base: str = "weights"  # or int8 or int4: the frozen matrices packed

    # Memory against time.
    gradient_checkpointing: bool = True
    loss_chunk: int = 128  # positions whose logits exist at once
    upcast: bool | None = None  # float32 products of bfloat16 weights; where they pay, if None
    compile: bool | None = None  # where it pays (CUDA), if None

    # What is watched and kept.
    seed: int = 0
    eval_every: int | None = None  # a tenth of the run, if None
    patience: int | None = None  # evaluations without improvement before stopping
    sample_every: int | None = None  # with each evaluation, if None
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    checkpoint_every: int | None = None  # with each evaluation, if None
    checkpoint_minutes: float = 15.0  # but never later than this after the one before
    keep: int = 2
    on_spike: str = "stop"
    spike_factor: float = 6.0  # standard deviations above the running mean of the loss
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("schedule", SCHEDULES),
            ("on_spike", ON_SPIKE),
            ("lora_base", LORA_BASES),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; expected one of {', '.join(allowed)}"
                )
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for field in ("batch_size", "accumulate", "loss_chunk", "sample_tokens", "keep"):
            _check_whole(field, getattr(self, field), 1)
        for field in ("steps", "eval_every", "sample_every", "checkpoint_every", "patience"):
            if getattr(self, field) is not None:
                _check_whole(field, getattr(self, field), 1)
        for field in ("warmup", "cooldown", "lora_rank", "seed"):
            if getattr(self, field) is not None:
                _check_whole(field, getattr(self, field), 0)
        limits: dict[str, tuple[float, float]] = {
            "epochs": (1e-9, 1e6),
            "learning_rate": (0.0, 1.0),
            "final_share": (0.0, 1.0),
            "weight_decay": (0.0, 1.0),
            "clip_norm": (1e-9, math.inf),
            "dropout": (0.0, 0.999),
            "lora_dropout": (0.0, 0.999),
            "layer_decay": (1e-9, 1.0),
            "lora_alpha": (1e-9, math.inf),
            "spike_factor": (1.0, math.inf),
            "checkpoint_minutes": (0.0, math.inf),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise ValueError(f"{field} is {value!r}; expected a number")
            if not low <= value <= high:
                raise ValueError(f"{field} is {value}; expected a number from {low:g} to {high:g}")
        unknown = [target for target in self.lora_targets if target not in LORA_TARGETS]
        if unknown or not self.lora_targets:
            raise ValueError(
                f"lora_targets has {', '.join(unknown) or 'nothing'}; expected some of "
                f"{', '.join(LORA_TARGETS)}"
            )

    def _check_combinations(self) -> None:
        if self.step_in_backward and self.accumulate > 1:
            raise ValueError(
                f"accumulate {self.accumulate} needs kept gradients, and the step inside the "
                f"backward pass frees them; use batch_size {self.batch_size * self.accumulate}, or "
                "step_in_backward=False (--keep-gradients)"
            )
        if self.step_in_backward and self.clip_norm is not None:
            raise ValueError(
                "clip_norm needs all gradients at once, and the step inside the backward pass "
                "frees each as it comes; adafactor clips each update by itself, or use "
                "step_in_backward=False (--keep-gradients)"
            )
        if self.upcast and self.precision != "bfloat16":
            raise ValueError(
                f"upcast concerns bfloat16 weights; with precision {self.precision} leave it out"
            )
        if self.cooldown and self.schedule != "constant":
            raise ValueError(
                f"cooldown ends a constant schedule, and {self.schedule} falls by itself; leave "
                "one of them out"
            )
        if self.lora_base != "weights" and not self.lora_rank:
            raise ValueError(
                f"lora_base {self.lora_base} without an adapter would train nothing; set lora_rank"
            )
        if self.lora_rank:
            for field, default in (
                ("train_layers", None),
                ("layer_decay", 1.0),
                ("freeze_embeddings", False),
            ):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"{field} concerns full fine-tuning; with lora_rank {self.lora_rank} the "
                        "model's own weights are frozen: leave one of them out"
                    )

    @property
    def learning_rate_used(self) -> float:
        """The learning rate at its peak."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """A whole fine-tuning: which model, which data, where to, and how.

    `out` is a .safetensors file, or with `lora_rank` a folder for the adapter. The run's own files
    (checkpoints, metrics.jsonl, loss.png) go to `folder`, by default OUT with the suffix .run.
    Raises as `TrainConfig` does; files are looked at by `finetune`.
    """

    model: str
    data: tuple[str, ...]
    out: str
    valid: tuple[str, ...] = ()
    valid_share: float = 0.05
    valid_limit: int = 200  # documents; more would make each evaluation long
    folder: str | None = None
    cache: str | None = None
    separator: str = "blank-line"
    text_field: str | None = None  # of JSON; fields are recognised, if None
    prompt_field: str | None = None
    completion_field: str | None = None
    length: int | None = None  # tokens a row; the model's positions, if None
    overlap: int | None = None  # an eighth of the length, if None
    min_tokens: int = 0
    pack: bool = False
    end_token: str | None = None
    resume: bool = False
    overwrite: bool = False
    device: str = "cpu"
    fresh_optimizer: bool = False  # even if the model file holds Adafactor's slots

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.record_fields
        if not self.data:
            raise ValueError("no data; give at least one file, folder or pattern")
        if not 0 <= self.valid_share < 1:
            raise ValueError(f"valid_share is {self.valid_share}; expected a number from 0 up to 1")
        if self.length is not None:
            _check_whole("length", self.length, 2)
        if self.overlap is not None:
            _check_whole("overlap", self.overlap, 0)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}; expected cpu, cuda or cuda:N")
        if self.lora_rank == 0 and Path(self.out).suffix != ".safetensors":
            raise ValueError(f"out is {self.out}; expected a name that ends in .safetensors")

    @property
    def record_fields(self) -> Fields:
        """The fields of JSON data that are named, checked together."""
        return Fields(self.text_field, self.prompt_field, self.completion_field)

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, metrics and plots of this run go."""
        return Path(self.folder) if self.folder else Path(self.out).with_suffix(".run")


def parse_layers(text: str, layers: int) -> set[int]:
    """Which of `layers` blocks "last:12", "first:2", "24-47" or "0,1,47" means.

    Raises `ValueError` for anything else.
    """
    cure = f'expected "last:N", "first:N", "A-B" or "A,B,C" within 0 to {layers - 1}'
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            if part.startswith(("last:", "first:")):
                count = int(part.split(":")[1])
                numbers = range(layers - count, layers) if part[0] == "l" else range(count)
            elif "-" in part:
                first, last = part.split("-")
                numbers = range(int(first), int(last) + 1)
            else:
                numbers = range(int(part), int(part) + 1)
            if not numbers:
                raise ValueError
            chosen |= set(numbers)
    except ValueError:
        raise ValueError(f"train_layers is {text!r}; {cure}") from None
    if not chosen <= set(range(layers)):
        raise ValueError(f"train_layers {text!r} names block {_outside(chosen, layers)}; {cure}")
    return chosen


def _outside(chosen: set[int], layers: int) -> int:
    return next(number for number in sorted(chosen) if not 0 <= number < layers)


def _check_whole(field: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"{field} is {value!r}; expected a whole number from {low}")


def _to_json(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
