"""`gpt2ml merge MODEL ADAPTER --out OUT`: a LoRA adapter added to the weights."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

from gpt2ml_torch.commands.output import one_line

EXAMPLES = (
    "gpt2ml merge out.safetensors adapter --out merged.safetensors",
    "gpt2ml merge out.safetensors adapter --out merged.safetensors --force",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the adapter, and where to."""
    parser.add_argument("model", metavar="MODEL", help="the model that the adapter was trained on")
    parser.add_argument("adapter", metavar="ADAPTER", help="its folder, as peft saves it")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument(
        "--force", dest="overwrite", action="store_true", help="replace an existing file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge and say where the result is."""
    if Path(arguments.out).exists() and not arguments.overwrite:
        raise FileExistsError(
            errno.EEXIST, f"{arguments.out} exists already; give another name, or --force"
        )
    from gpt2ml_torch.finetuning.adapters import merge_adapter

    merge_adapter(arguments.model, arguments.adapter, arguments.out, overwrite=arguments.overwrite)
    print(one_line(f"wrote {arguments.out}"))
    return 0
