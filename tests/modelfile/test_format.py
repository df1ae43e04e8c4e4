"""docs/format.md is enough to read a file: this reader knows the page and NumPy only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2ml_torch.kernels import packing
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.modelfile.checksum import table_crc32c
from gpt2ml_torch.modelfile.format import expected_shapes
from gpt2ml_torch.precision import Precision
from tests.helpers.old_files import CONFIG, VOCAB, numbers

CODES = {"F32": "<f4", "BF16": "<u2", "U8": "u1"}


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]], dict[str, int]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors, checksums = {}, {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        checksums[name] = table_crc32c(content[start:end])
        values = np.frombuffer(content[start:end], CODES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return metadata, tensors, checksums


def unpack(
    weight: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], bits: int
) -> np.ndarray[Any, Any]:
    group, offset = {8: (128, 128), 4: (32, 8)}[bits]
    panels, steps = weight.shape[:2]
    inputs = steps * 32 // bits
    rows = np.zeros((panels * 16, inputs), np.float32)
    for panel in range(panels):
        for row in range(16):
            for k in range(inputs):
                if bits == 8:
                    number = int(weight[panel, k // 4, row, k % 4])
                else:
                    byte = int(weight[panel, k // 8, row, k % 4])
                    number = byte & 15 if k % 8 < 4 else byte >> 4
                rows[panel * 16 + row, k] = (number - offset) * scale[panel, k // group, row]
    return rows


@pytest.mark.parametrize("packed", ["int8", "int4"])
def test_a_packed_file_is_read_by_the_specification(packed: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with ModelWriter(path, CONFIG, dtype="float32", vocab=VOCAB, packed=packed) as writer:
        for name, shape in expected_shapes(CONFIG).items():
            writer.write_weight(name, numbers(name, shape))
    metadata, tensors, checksums = read(path)
    with ModelFile.open(path) as file:
        loaded = file.state_dict()
        assert file.checksums == checksums
    for name, shape in expected_shapes(CONFIG).items():
        scale = tensors.get(name + "_scale")
        if scale is None:
            assert np.array_equal(tensors[name], numbers(name, shape).numpy())
            continue
        precision = Precision("int8" if name.startswith("token") else packed)
        found = unpack(tensors[name], scale, precision.bits)[: shape[0], : shape[1]]
        memory = loaded[name], loaded[name + "_scale"]
        expected = packing.unpack(*memory, precision.bits, *shape[:1], *shape[1:])
        assert torch.equal(torch.from_numpy(found), expected)
    assert metadata["quantization"] == packed


def test_the_metadata_have_the_checksum_that_the_specification_says(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with ModelWriter(path, CONFIG, dtype="float32", vocab=VOCAB, source={"a": "春"}) as writer:
        for name, shape in expected_shapes(CONFIG).items():
            writer.write(name, numbers(name, shape))
    metadata, tensors, checksums = read(path)
    own = metadata.pop("metadata_crc32c")
    text = json.dumps(metadata, sort_keys=True, separators=(", ", ": "), ensure_ascii=False)
    assert own == f"{table_crc32c(text.encode()):08x}"
    assert json.loads(metadata["crc32c"]) == {n: f"{c:08x}" for n, c in checksums.items()}
    assert json.loads(metadata["config"]) == CONFIG.to_dict()
    assert (metadata["format"], metadata["gpt2ml_format"], metadata["vocab"]) == ("pt", "1", VOCAB)
    content = path.read_bytes()
    assert (8 + struct.unpack("<Q", content[:8])[0]) % 4096 == 0
    assert {n: t.shape for n, t in tensors.items()} == expected_shapes(CONFIG)
