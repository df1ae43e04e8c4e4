"""Headers and metadata with arbitrary JSON anywhere: one line of error, or a working model."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from gpt2ml_torch import Generator
from scripts.attacks.tools import ALLOWED, any_json, write_model

_TEXTS = ("config", "generation", "source", "crc32c")


class Attack:
    def __init__(self, folder: Path) -> None:
        self._path = write_model(folder / "model.safetensors")
        data = self._path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        self._header: dict[str, Any] = json.loads(data[8 : 8 + length])
        self._rest = data[8 + length :]

    def __call__(self, draw: random.Random) -> None:
        header = json.loads(json.dumps(self._header))
        metadata = header["__metadata__"]
        metadata.pop("metadata_crc32c", None)  # a hostile writer can leave it out
        for _ in range(draw.randint(1, 3)):
            self._change(draw, header, metadata)
        text = json.dumps(header).encode()
        self._path.write_bytes(struct.pack("<Q", len(text)) + text + self._rest)
        try:
            generator = Generator.from_pretrained(self._path, quantize=None, compile=False)
            generator.generate("今天", max_new_tokens=2, num_return_sequences=1)
        except ALLOWED:
            pass

    def _change(
        self, draw: random.Random, header: dict[str, Any], metadata: dict[str, Any]
    ) -> None:
        kind = draw.randrange(4)
        if kind == 0:
            metadata[draw.choice([*metadata, "new"])] = any_json(draw)
        elif kind == 1:
            name = draw.choice([name for name in _TEXTS if name in metadata] or ["source"])
            metadata[name] = json.dumps(any_json(draw))
        elif kind == 2:
            values = json.loads(metadata["config"]) if _is_object(metadata.get("config")) else {}
            values[draw.choice([*values, "extra"])] = any_json(draw)
            metadata["config"] = json.dumps(values)
        else:
            name = draw.choice([name for name in header if name != "__metadata__"])
            if draw.random() < 0.5 or not isinstance(header[name], dict) or not header[name]:
                header[name] = any_json(draw)
            else:
                header[name][draw.choice(list(header[name]))] = any_json(draw)


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        return False
