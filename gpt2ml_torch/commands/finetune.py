"""`gpt2ml finetune MODEL DATA... --out OUT`: its arguments, its signals, and what is printed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

from gpt2ml_torch.commands.training_bar import TrainingBar
from gpt2ml_torch.finetuning.config import (
    LORA_BASES,
    LORA_TARGETS,
    ON_SPIKE,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    FinetuneConfig,
)
from gpt2ml_torch.finetuning.data.documents import SEPARATORS

EXAMPLES = (
    "gpt2ml finetune out.safetensors texts/ --out mine.safetensors --epochs 2",
    "gpt2ml finetune out.safetensors texts/ --out adapter --lora-rank 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `FinetuneConfig`, under the names of the command line."""
    parser.add_argument("model", metavar="MODEL", help="a converted model, .safetensors")
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="text or JSON Lines: files, folders"
    )
    parser.add_argument(
        "--out", required=True, help="the tuned model to write (or an adapter's folder)"
    )
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    _add_memory(parser.add_argument_group("memory"))
    _add_run(parser.add_argument_group("the run"))


def _add_data(group: Any) -> None:
    group.add_argument(
        "--valid", action="append", default=[], metavar="FILE", help="validation data"
    )
    group.add_argument("--valid-share", type=float, default=0.05, help="held out otherwise")
    group.add_argument("--valid-limit", type=int, default=200, help="documents an evaluation reads")
    group.add_argument("--separator", choices=SEPARATORS, default="blank-line")
    group.add_argument("--text-field", metavar="NAME", help="the JSON field that holds the text")
    group.add_argument("--prompt-field", metavar="NAME", help="the field that is only read")
    group.add_argument("--completion-field", metavar="NAME", help="the field learned after it")
    group.add_argument("--length", type=int, help="tokens a row (the model's positions)")
    group.add_argument("--overlap", type=int, help="tokens that windows of a long text share")
    group.add_argument("--min-tokens", type=int, default=0, help="leave shorter documents out")
    group.add_argument("--pack", action="store_true", help="several documents a row, kept apart")
    group.add_argument("--end-token", help='append it to each document, such as "[SEP]"')
    group.add_argument("--cache", metavar="DIR", help="where tokenised data are kept")


def _add_training(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=1.0)
    group.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument(
        "--batch-size",
        type=int,
        default=os.environ.get("WORLD_SIZE", "1"),  # torchrun's
        help="rows a step (1; under torchrun one for each process)",
    )
    group.add_argument(
        "--accumulate", type=int, default=1, help="batches a step, with --keep-gradients"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adafactor")
    group.add_argument(
        "--fresh-optimizer",
        action="store_true",
        help="leave the Adafactor statistics alone that MODEL may hold",
    )
    group.add_argument("--learning-rate", "--lr", type=float, help="1e-5 (LoRA: 1e-4)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    group.add_argument("--warmup", type=int, help="steps (5 %% of all)")
    group.add_argument(
        "--cooldown", type=int, default=0, metavar="STEPS", help="linear end of a constant rate"
    )
    group.add_argument("--final-share", type=float, default=0.1, help="of the rate, at the end")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-norm", type=float, help="with --keep-gradients")
    group.add_argument("--dropout", type=float, help="the model's own (0.1) unless given")
    group.add_argument("--layer-decay", type=float, default=1.0, help="of the rate, layer by layer")
    group.add_argument("--train-layers", metavar="WHICH", help='"last:12", "24-47" or "0,1,47"')
    group.add_argument("--freeze-embeddings", action="store_true")
    group.add_argument("--lora-rank", type=int, default=0, help="train an adapter of this rank")
    group.add_argument("--lora-alpha", type=float, help="twice the rank")
    group.add_argument("--lora-targets", default=",".join(LORA_TARGETS), metavar="NAMES")
    group.add_argument("--lora-dropout", type=float, default=0.0)
    group.add_argument("--lora-base", choices=LORA_BASES, default="weights")


def _add_memory(group: Any) -> None:
    group.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    group.add_argument(
        "--keep-gradients",
        dest="step_in_backward",
        action="store_false",
        help="step after the backward pass, not inside it",
    )
    group.add_argument(
        "--round-to-nearest",
        dest="stochastic_rounding",
        action="store_false",
        help="bfloat16 weights without stochastic rounding",
    )
    group.add_argument(
        "--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false"
    )
    group.add_argument("--loss-chunk", type=int, default=128, help="positions with logits at once")
    group.add_argument(
        "--upcast",
        action=argparse.BooleanOptionalAction,
        help="multiply bfloat16 weights in float32 (on CPUs without bfloat16 instructions)",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="on CUDA by default"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    group.add_argument("--dry-run", action="store_true", help="predict the memory and stop")
    group.add_argument(
        "--memory", metavar="SIZE", help="what there is, such as 22GB, for --dry-run"
    )


def _add_run(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--eval-every", type=int, metavar="STEPS", help="a tenth of the run")
    group.add_argument("--patience", type=int, help="evaluations without gain before stopping")
    group.add_argument("--prompt", dest="prompts", action="append", default=[], help="to continue")
    group.add_argument("--sample-every", type=int, metavar="STEPS", help="with each evaluation")
    group.add_argument("--sample-tokens", type=int, default=64)
    group.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="with each evaluation")
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=15.0,
        metavar="MINUTES",
        help="never later than this after the one before",
    )
    group.add_argument("--keep", type=int, default=2, help="last checkpoints to keep")
    group.add_argument("--on-spike", choices=ON_SPIKE, default="stop")
    group.add_argument("--spike-factor", type=float, default=6.0)
    group.add_argument("--tensorboard", action="store_true")
    group.add_argument(
        "--folder", metavar="DIR", help="the run's own files (OUT without suffix, .run)"
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group.add_argument(
        "--force", dest="overwrite", action="store_true", help="replace what is there"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Check the settings, then predict or train."""
    from gpt2ml_torch.commands.common import (
        choose_device,
    )  # brings torch, which help can do without

    # What a GPU would take can be predicted without one.
    arguments.device = str(choose_device(arguments.device, present=not arguments.dry_run))
    config = to_config(arguments)
    if arguments.memory is not None and not arguments.dry_run:
        raise ValueError("--memory is for --dry-run; add that, or leave it out")
    if arguments.dry_run:
        return _dry_run(config, arguments.memory)
    return _finetune(config, quiet=arguments.quiet)


def to_config(arguments: argparse.Namespace) -> FinetuneConfig:
    """The settings; raises `ValueError` for those that exclude each other."""
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in fields}
    for name in ("data", "valid", "prompts"):
        values[name] = tuple(values[name])
    values["lora_targets"] = tuple(filter(None, values["lora_targets"].split(",")))
    return FinetuneConfig(**values)


def _dry_run(config: FinetuneConfig, memory: str | None) -> int:
    from gpt2ml_torch.finetuning.memory import parse_size, predict, suggestion

    available = parse_size(memory) if memory is not None else None
    prediction = predict(config)
    print(prediction)
    if available is None:
        return 0
    fits = prediction.total <= available
    print("that fits" if fits else suggestion(config, available))
    return 0 if fits else 1


def _finetune(config: FinetuneConfig, *, quiet: bool) -> int:
    from gpt2ml_torch.commands.common import show_log
    from gpt2ml_torch.finetuning.distributed import process_rank, processes
    from gpt2ml_torch.finetuning.memory import tune_allocator
    from gpt2ml_torch.finetuning.run import finetune

    tune_allocator()
    with processes(config.device), _interruptible() as stopped:
        first = process_rank() == 0
        show_log(quiet=quiet or not first)
        show = TrainingBar(quiet=quiet or not first)
        try:
            result = finetune(
                config,
                callback=show,
                should_stop=lambda: bool(stopped),
                on_data=show.data if first else None,
                on_tokenizing=show.tokenizing,
            )
        finally:
            show.close()
    if first:
        print(_summary(config, result), file=sys.stderr)
    return {"interrupted": 130, "spike": 1}.get(result.reason, 0)


def _summary(config: FinetuneConfig, result: Any) -> str:
    if result.reason == "interrupted":
        return (
            f"stopped after step {result.step} of {result.total_steps}, saved in "
            f"{result.last_checkpoint}; the same command with --resume goes on"
        )
    if result.reason == "spike":
        good = result.last_checkpoint or "none was saved"
        return (
            f"gpt2ml: error: stopped at step {result.step + 1}, {result.trouble}; last good "
            f"checkpoint: {good} (--resume goes on from it, --on-spike skip leaves such steps out)"
        )
    best = f", validation loss {result.best_loss:.4f} at step {result.best_step}" * (
        result.best_loss is not None
    )
    written = " and ".join(str(path) for path in (result.model, result.adapter) if path)
    return (
        f"{result.reason}: {result.step} steps{best}; wrote {written}, curves in "
        f"{config.run_folder}"
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that the first Ctrl-C (or TERM) puts something in; the second interrupts at once."""
    stopped: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        os.write(2, b"\nfinishing this step, then saving; once more to stop at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
