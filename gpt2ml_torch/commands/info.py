"""`gpt2ml info MODEL`: what a model file holds, without loading its weights."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from gpt2ml_torch.commands.output import one_line, write_json
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import count_lines
from gpt2ml_torch.options import option
from gpt2ml_torch.valid_json import to_json

EXAMPLES = (
    "gpt2ml info out.safetensors --verify",
    "gpt2ml info out.safetensors --json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """The model file to describe, and how."""

    model: str = option(
        positional=True, path=True, help="a .safetensors file made by the converter"
    )
    json: bool = option(False, flags="--json", help="print one JSON object")
    verify: bool = option(
        False, flags="--verify", help="read the whole file and compare every checksum"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, InfoOptions)


def run(arguments: argparse.Namespace) -> int:
    options = InfoOptions(**given(arguments, InfoOptions))
    with ModelFile.open(options.model) as file:
        values = _describe(file)
        if options.verify:
            file.verify()
            values["verified"] = True
    if options.json:
        write_json(values)
        return 0
    if options.verify:
        values["verified"] = f"{len(file.checksums)} tensors and the metadata match their checksums"
    width = max(map(len, values))
    for name, value in values.items():
        # A stranger's file may hold anything in the strings of its metadata.
        shown = one_line(to_json(value) if isinstance(value, dict) else str(value))
        print(f"{name:{width}}  {shown}")
    return 0


def _describe(file: ModelFile) -> dict[str, Any]:
    config = file.config
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "tokens": None if file.vocab is None else count_lines(file.vocab),
        "parameters": config.num_parameters,
        "dtype": file.dtype,
        "quantization": file.packed,
        "checksums": "crc32c" if file.checksums else None,
        "bytes": file.size,
        "source": file.source,
        "generation": file.generation,
    }
