"""`gpt2ml info MODEL`: what a model file holds, without loading its weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpt2ml_torch.commands.output import one_line, write_json
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import count_lines

EXAMPLES = (
    "gpt2ml info out.safetensors",
    "gpt2ml info out.safetensors --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .safetensors file made by the converter")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    values = _describe(arguments.model)
    if arguments.json:
        write_json(values)
        return 0
    width = max(map(len, values))
    for name, value in values.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        print(f"{name:{width}}  {one_line(str(shown))}")
    return 0


def _describe(path: str) -> dict[str, Any]:
    metadata = ModelFile.open(path)
    config = metadata.config
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "tokens": None if metadata.vocab is None else count_lines(metadata.vocab),
        "parameters": config.num_parameters,
        "dtype": metadata.dtype,
        "quantization": metadata.packed,
        "bytes": Path(path).stat().st_size,
        "source": metadata.source,
        "generation": metadata.generation,
    }
