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
from typing import TYPE_CHECKING, Any

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.parsing import add_options, flags_of, given
from gpt2ml_torch.commands.training_bar import TrainingBar
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.options import Namer, OptionError, option

if TYPE_CHECKING:
    from gpt2ml_torch.finetuning.run import FinetuneResult

EXAMPLES = (
    "gpt2ml finetune out.safetensors texts/ --out mine.safetensors --epochs 2",
    "gpt2ml finetune out.safetensors texts/ --out adapter --lora-rank 16",
)


_GROUP = "the command"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options of the command only. Raises `ValueError` for `memory` without `dry_run`."""

    dry_run: bool = option(
        False, flags="--dry-run", group=_GROUP, help="estimate the memory and stop"
    )
    memory: str | None = option(
        None,
        metavar="SIZE",
        group=_GROUP,
        help="with --dry-run: the available memory, such as 22GB",
    )
    quiet: bool = option(False, flags="--quiet", group=_GROUP, help="no progress bar")

    def __post_init__(self) -> None:
        if self.memory is not None and not self.dry_run:
            raise OptionError("{memory} is for {dry_run=True}; add that, or leave it out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every field of `FinetuneConfig` and the command's own options."""
    add_options(parser, FinetuneConfig)
    add_options(parser, CommandOptions)
    parser.set_defaults(namer=flags_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Check the settings, then estimate or train."""
    from gpt2ml_torch.devices import choose_device  # brings torch, which help can do without

    # The memory on a GPU can be estimated without one.
    options = CommandOptions(**given(arguments, CommandOptions))
    device = str(getattr(arguments, "device", "auto"))
    arguments.device = str(choose_device(device, present=not options.dry_run))
    config = to_config(arguments)
    if options.dry_run:
        return _dry_run(config, options.memory, arguments.namer)
    return _finetune(config, quiet=options.quiet)


def to_config(arguments: argparse.Namespace) -> FinetuneConfig:
    """The settings; raises `ValueError` for settings that make no sense."""
    values = given(arguments, FinetuneConfig)
    # Under torchrun, which sets this variable, a row for each process.
    values.setdefault("batch_size", int(os.environ.get("WORLD_SIZE", "1")))
    return FinetuneConfig(**values)


def _dry_run(config: FinetuneConfig, memory: str | None, namer: Namer) -> int:
    from gpt2ml_torch.finetuning.memory import GIB, cheaper_settings, estimate_memory, parse_size

    available = parse_size(memory) if memory is not None else None
    estimate = estimate_memory(config)
    print(estimate)
    if available is None:
        return 0
    if estimate.total <= available:
        print("that fits")
        return 0
    cheaper = cheaper_settings(config, available)
    if cheaper is None:
        print(f"that does not fit into {available / GIB:.2f} GiB, and no setting here would")
    else:
        changes, total = cheaper
        names = ", ".join(namer(name, str(value)) for name, value in changes.items())
        print(f"that does not fit; it would with {names}: {total / GIB:.2f} GiB")
    return 1


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
        print(one_line(_summary(config, result)), file=sys.stderr)
    return {"interrupted": 130, "spike": 1}.get(result.reason, 0)


def _summary(config: FinetuneConfig, result: FinetuneResult) -> str:
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
    best = ""
    if result.best_loss is not None:
        best = f", validation loss {result.best_loss:.4f} at step {result.best_step}"
    written = " and ".join(str(path) for path in (result.model, result.adapter) if path)
    return (
        f"{result.reason}: {result.step} steps{best}; wrote {written}, curves in "
        f"{config.run_folder}"
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list to which the first Ctrl-C or SIGTERM adds an item; a second one interrupts at once."""
    stopped: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        with contextlib.suppress(OSError):  # a closed stderr
            os.write(2, b"\nfinishing this step, then saving; once more to stop at once\n")

    before: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
