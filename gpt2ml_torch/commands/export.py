"""`gpt2ml export MODEL FOLDER`: a folder for transformers and the programs around it."""

from __future__ import annotations

import argparse

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.export.folder import ExportOptions, export_folder

EXAMPLES = (
    "gpt2ml export out.safetensors folder",
    "gpt2ml export out.safetensors adapter-for-peft --adapter adapter",
    "gpt2ml export out.safetensors folder --dtype bfloat16 --shard-size 1GB",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .safetensors file made by the converter")
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write")
    add_options(parser, ExportOptions)
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="write this LoRA adapter, trained here, for the exported class, and not the model",
    )


def run(arguments: argparse.Namespace) -> int:
    options = ExportOptions(**given(arguments, ExportOptions))
    if arguments.adapter is not None:
        from gpt2ml_torch.finetuning.adapter_export import export_adapter

        export_adapter(arguments.model, arguments.adapter, arguments.folder)
        print(one_line(f"wrote {arguments.folder}"))
        return 0
    folder = export_folder(arguments.model, arguments.folder, options)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(one_line(f"wrote {folder}: {size:,} bytes"))
    return 0
