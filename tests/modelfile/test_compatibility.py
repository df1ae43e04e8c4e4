"""Model files of version 0.1.0 load as they always did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2ml_torch import GPT2ML, Tokenizer, kernels
from gpt2ml_torch.kernels import packing
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import SLOT, expected_shapes, packed_precision, slot_shapes
from gpt2ml_torch.precision import Precision
from tests.helpers.old_files import CONFIG, FOLDER, GENERATION, SOURCE, VOCAB, numbers

DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "float32",
    "int4": "bfloat16",
    "optimizer": "float32",
}


@pytest.fixture(params=DTYPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def test_an_old_file_says_the_same_of_itself(name: str) -> None:
    with ModelFile.open(path_of(name)) as file:
        assert (file.config, file.vocab) == (CONFIG, VOCAB)
        assert (file.source, file.generation) == (SOURCE, GENERATION)
        assert (file.dtype, file.checksums) == (DTYPES[name], {})
        assert file.packed == (name if name.startswith("int") else None)
        assert file.precision == (file.packed or file.dtype)
        assert file.tokenizer() == Tokenizer(VOCAB, num_embeddings=24)


def test_an_old_file_loads_with_equal_tensors(name: str) -> None:
    with ModelFile.open(path_of(name)) as file:
        found, packed, dtype = file.state_dict(), file.packed, file.dtype.dtype
        statistics = file.optimizer_state()
    for weight, shape in expected_shapes(CONFIG).items():
        expected = numbers(weight, shape).to(dtype)
        precision = packed_precision(weight, packed)
        if precision is None:
            assert torch.equal(found.pop(weight), expected)
        else:
            memory, scale = packing.empty_packed(shape[0], shape[1], precision)
            packing.pack_rows(expected, memory, scale, precision.bits)
            assert torch.equal(found.pop(weight), memory)
            assert scale is not None
            assert torch.equal(found.pop(f"{weight}_scale"), scale)
    assert not found
    assert statistics.keys() == (slot_shapes(CONFIG).keys() if name == "optimizer" else set())
    for slot, value in statistics.items():
        assert torch.equal(value, numbers(slot, tuple(value.shape)).abs())


def test_the_safetensors_library_reads_the_same(name: str) -> None:
    with ModelFile.open(path_of(name)) as file:
        found = file.state_dict() | {
            SLOT + slot: value for slot, value in file.optimizer_state().items()
        }
    expected = load_file(path_of(name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_old_file_makes_the_same_model(name: str) -> None:
    model = GPT2ML.from_pretrained(path_of(name), dtype=torch.float32)
    plain = GPT2ML(CONFIG).eval()
    plain.load_state_dict({key: numbers(key, s) for key, s in expected_shapes(CONFIG).items()})
    dtype = Precision.of(DTYPES[name]).dtype
    plain = plain.to(dtype).float()
    if name.startswith("int"):
        kernels.pack_model(plain, name)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))


def test_verifying_an_old_file_says_that_it_has_no_checksums(name: str) -> None:
    with ModelFile.open(path_of(name)) as file:
        with pytest.raises(ValueError, match=r"holds no checksums: it was written by version 0\.1"):
            file.verify()
        for tensor in file.tensors:
            file.tensor(tensor)  # nothing to compare with
