"""`gpt2ml merge MODEL ADAPTER --out OUT`: a LoRA adapter added to the weights."""

from __future__ import annotations

import argparse
import dataclasses

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.disk import resolve_target
from gpt2ml_torch.options import option

EXAMPLES = (
    "gpt2ml merge out.safetensors adapter --out merged.safetensors",
    "gpt2ml merge out.safetensors adapter --out merged.safetensors --force",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The model, the adapter to add to it, and the output file."""

    model: str = option(
        positional=True, path=True, help="the model that the adapter was trained on"
    )
    adapter: str = option(positional=True, path=True, help="the adapter's folder, as peft saves it")
    out: str = option(path=True, help="the file to write")
    overwrite: bool = option(False, flags="--force", help="replace an existing file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add_options(parser, MergeOptions)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and print the name of the result."""
    options = MergeOptions(**given(arguments, MergeOptions))
    resolve_target(options.out, overwrite=options.overwrite)  # before the imports, which take long
    from gpt2ml_torch.finetuning.adapters import merge_adapter

    merge_adapter(options.model, options.adapter, options.out, overwrite=options.overwrite)
    print(one_line(f"wrote {options.out}"))
    return 0
