"""`gpt2ml quantize MODEL --to int8 --out OUT`: the same model with packed weights."""

from __future__ import annotations

import argparse
import dataclasses

from gpt2ml_torch.commands.output import one_line
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.options import option
from gpt2ml_torch.precision import INTEGER

EXAMPLES = (
    "gpt2ml quantize out.safetensors --out out-int8.safetensors",
    "gpt2ml quantize out.safetensors --to int4 --out out-int4.safetensors",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The model file to pack, the precision, and the output file."""

    model: str = option(
        positional=True, path=True, help="a .safetensors file made by the converter"
    )
    to: str = option(
        "int8",
        choices=tuple(precision.value for precision in INTEGER),
        help="precision of the large matrices",
    )
    out: str = option(path=True, help="the file to write")
    overwrite: bool = option(False, flags="--force", help="replace an existing file")
    allow_non_finite: bool = option(
        False,
        flags="--allow-non-finite",
        help="copy NaN and infinity in tensors that stay unpacked, instead of refusing them",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, QuantizeOptions)


def run(arguments: argparse.Namespace) -> int:
    options = QuantizeOptions(**given(arguments, QuantizeOptions))
    file = ModelFile.open(options.model)
    if file.packed is not None:
        raise ValueError(
            f"{options.model} holds {file.packed} weights already; give the file that "
            "it was made from"
        )
    with ModelWriter(
        options.out,
        file.config,
        dtype=file.dtype,
        vocab=file.vocab,
        source=file.source,
        generation=file.generation,
        packed=options.to,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    ) as writer:
        for name in file.tensors:
            writer.write_weight(name, file.tensor(name))
    print(one_line(f"wrote {options.out}: {options.to}, {writer.size:,} bytes"))
    return 0
