"""`gpt2ml quantize MODEL --to int8 --out OUT`: the same model with packed weights."""

from __future__ import annotations

import argparse

from gpt2ml_torch.modelfile.format import QUANTIZATIONS
from gpt2ml_torch.modelfile.reader import CheckpointWriter, read_metadata, read_tensor

EXAMPLES = (
    "gpt2ml quantize out.safetensors --out out-int8.safetensors",
    "gpt2ml quantize out.safetensors --to int4 --out out-int4.safetensors",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .safetensors file made by the converter")
    parser.add_argument("--to", choices=QUANTIZATIONS, default="int8", help="default: %(default)s")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> int:
    metadata = read_metadata(arguments.model)
    if metadata.quantization is not None:
        raise ValueError(
            f"{arguments.model} holds {metadata.quantization} weights already; give the file that "
            "it was made from"
        )
    with CheckpointWriter(
        arguments.out,
        metadata.config,
        dtype=metadata.dtype,
        vocab=metadata.vocab,
        source=metadata.source,
        generation=metadata.generation,
        quantization=arguments.to,
        overwrite=arguments.force,
    ) as writer:
        for name, info in metadata.tensors.items():
            writer.write_weight(name, read_tensor(arguments.model, info))
    print(f"wrote {arguments.out}: {arguments.to}, {writer.size:,} bytes")
    return 0
