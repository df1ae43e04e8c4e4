"""`gpt2ml quantize MODEL --to int8 --out OUT`: the same model with packed weights."""

from __future__ import annotations

import argparse

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.precision import INTEGER

EXAMPLES = (
    "gpt2ml quantize out.safetensors --out out-int8.safetensors",
    "gpt2ml quantize out.safetensors --to int4 --out out-int4.safetensors",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .safetensors file made by the converter")
    parser.add_argument(
        "--to",
        choices=[precision.value for precision in INTEGER],
        default="int8",
        help="default: %(default)s",
    )
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument(
        "--force", dest="overwrite", action="store_true", help="replace an existing file"
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="copy NaN and infinity in tensors that stay unpacked, instead of refusing them",
    )


def run(arguments: argparse.Namespace) -> int:
    file = ModelFile.open(arguments.model)
    if file.packed is not None:
        raise ValueError(
            f"{arguments.model} holds {file.packed} weights already; give the file that "
            "it was made from"
        )
    with ModelWriter(
        arguments.out,
        file.config,
        dtype=file.dtype,
        vocab=file.vocab,
        source=file.source,
        generation=file.generation,
        packed=arguments.to,
        overwrite=arguments.overwrite,
        allow_non_finite=arguments.allow_non_finite,
    ) as writer:
        for name in file.tensors:
            writer.write_weight(name, file.tensor(name))
    print(one_line(f"wrote {arguments.out}: {arguments.to}, {writer.size:,} bytes"))
    return 0
