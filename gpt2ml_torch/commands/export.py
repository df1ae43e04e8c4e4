"""`gpt2ml export MODEL FOLDER`: a folder for transformers and the programs around it."""

from __future__ import annotations

import argparse
import dataclasses

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from gpt2ml_torch.options import OptionError, option

EXAMPLES = (
    "gpt2ml export out.safetensors folder",
    "gpt2ml export out.safetensors adapter-for-peft --adapter adapter",
    "gpt2ml export out.safetensors folder --dtype bfloat16 --shard-size 1GB",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments(ExportOptions):
    """The model, or the adapter, to export, the folder, and how to export."""

    model: str = option(
        positional=True, path=True, help="a .safetensors file made by the converter"
    )
    folder: str = option(positional=True, path=True, help="the folder to write")
    adapter: str | None = option(
        None,
        path=True,
        metavar="FOLDER",
        help="instead of the model, write this LoRA adapter, trained here, for the exported class",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    add_options(parser, ExportArguments)


def run(arguments: argparse.Namespace) -> int:
    """Export the model or the adapter, and print where it is."""
    options = ExportArguments(**given(arguments, ExportArguments))
    if options.adapter is not None:
        from gpt2ml_torch.finetuning.adapter_export import export_adapter

        for name in given(arguments, ExportOptions):
            raise OptionError("{" + name + "} has no meaning with {adapter}; leave it out")
        export_adapter(options.model, options.adapter, options.folder)
        print(one_line(f"wrote {options.folder}"))
        return 0
    folder = export_folder(options.model, options.folder, options)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(one_line(f"wrote {folder}: {size:,} bytes"))
    return 0
