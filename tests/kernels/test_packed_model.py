"""A Generator packs a plain model by itself, in place and undoably, and only where that is safe."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpt2ml_torch import GPT2ML, Generator, kernels
from gpt2ml_torch.kernels import packing
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.precision import Precision
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "top_k": 20, "seed": 3}

needs_kernels = pytest.mark.skipif(
    not kernels.load_kernels(), reason="no compiler or no AVX2: nothing is packed by itself"
)


def model_file(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(TOKENIZER).to(dtype).save_pretrained(folder / "m", tokenizer=TOKENIZER)
    return folder / "m"


def generator_of(model: GPT2ML, **options: Any) -> Generator:
    return Generator(model, TOKENIZER, compile=False, **options)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_model_writes_what_one_packed_while_loading_writes(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = model_file(tmp_path)
    name = str(dtype).removeprefix("torch.")
    with caplog.at_level(logging.INFO, logger="gpt2ml_torch"):
        found = generator_of(GPT2ML.from_pretrained(path, dtype=dtype))
    assert [record.message for record in caplog.records if "packed" in record.message] == [
        f"packed the weights for the CPU's kernels, in {name} as they were; kernels.unpack_model "
        "undoes it, and pack=False leaves them plain"
    ]
    expected = Generator.from_pretrained(path, dtype=dtype, quantize=name, compile=False)
    assert found.engine.on_kernels
    assert found.model.packed == expected.model.packed == Precision(name)
    assert found.generate(["今天", "春"], **OPTIONS) == expected.generate(["今天", "春"], **OPTIONS)
    for one, other in zip(
        found.model.state_dict().values(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_restores_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_model(TOKENIZER).to(dtype)
    model.blocks[1].mlp.up.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    generator = generator_of(model)
    assert model.packed is not None
    generator.unpack()
    assert model.packed is None
    assert not generator.engine.on_kernels
    assert model.state_dict().keys() == twin.state_dict().keys()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad or name.endswith("bias")
        assert one.is_contiguous()
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert generator.generate("春", **OPTIONS) == generator_of(twin, pack=False).generate(
        "春", **OPTIONS
    )


@needs_kernels
def test_unpacking_rounded_weights_gives_what_the_integers_stand_for() -> None:
    model = kernels.pack_model(tiny_model(TOKENIZER), "int8")
    expected = model.blocks[0].mlp.up.dequantized()
    kernels.unpack_model(model)
    assert type(model.blocks[0].mlp.up) is nn.Linear
    assert torch.equal(model.blocks[0].mlp.up.weight, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_was_packed_by_itself_is_saved_as_it_was(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(TOKENIZER).to(dtype)
    model.save_pretrained(tmp_path / "before", tokenizer=TOKENIZER)
    generator_of(model).model.save_pretrained(tmp_path / "after", tokenizer=TOKENIZER)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def _shared(model: GPT2ML) -> None:
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight


def _subclass(model: GPT2ML) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.blocks[1].mlp.up = Doubled(32, 64)


def _gradient(model: GPT2ML) -> None:
    model.embedding_norm.weight.grad = torch.zeros(32)


def _patched(model: GPT2ML) -> None:
    layer = model.blocks[0].mlp
    layer.forward = lambda x: x


LEFT_ALONE: dict[str, tuple[Callable[[GPT2ML], Any], str]] = {
    "in training": (lambda m: m.train(), "being trained"),
    "with gradients": (_gradient, "being trained"),
    "hook on a layer": (
        lambda m: m.blocks[1].mlp.up.register_forward_hook(lambda *a: None),
        "adapters, hooks",
    ),
    "pre-hook on a block": (
        lambda m: m.blocks[0].register_forward_pre_hook(lambda *a: None),
        "adapters, hooks",
    ),
    "hook on a norm": (
        lambda m: m.blocks[0].mlp_norm.register_forward_hook(lambda *a: None),
        "adapters, hooks",
    ),
    "subclass": (_subclass, "adapters, hooks"),
    "a forward of its own": (_patched, "adapters, hooks"),
    "another eps": (lambda m: setattr(m.blocks[1].mlp_norm, "eps", 1e-3), "adapters, hooks"),
    "shared weights": (_shared, "shared"),
    "two dtypes": (lambda m: m.blocks[0].mlp.up.bfloat16(), "several dtypes"),
}


@needs_kernels
@pytest.mark.parametrize("case", LEFT_ALONE)
def test_a_model_that_must_not_be_packed_is_left_alone_and_the_log_says_why(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = LEFT_ALONE[case]
    model = tiny_model(TOKENIZER)
    change(model)
    with caplog.at_level(logging.INFO, logger="gpt2ml_torch"):
        kernels.pack_for_decoding(model)
    assert model.packed is None
    assert any(reason in record.message for record in caplog.records)
    assert not any(isinstance(module, kernels.PackedLinear) for module in model.modules())


@needs_kernels
def test_packing_waits_for_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = model_file(tmp_path)
    weights = sum(w.nbytes for n, w in tiny_model(TOKENIZER).named_parameters() if w.ndim == 2)
    monkeypatch.setattr(packing, "available_memory", lambda: weights // 2)
    with caplog.at_level(logging.INFO, logger="gpt2ml_torch"):
        mapped = generator_of(GPT2ML.from_pretrained(path)).model
        owned = generator_of(tiny_model(TOKENIZER)).model
    assert (mapped.packed, owned.packed) == (None, "float32")
    assert any("quantize=" in record.message for record in caplog.records)


@needs_kernels
def test_a_hook_on_a_packed_model_is_called() -> None:
    model = kernels.pack_model(tiny_model(TOKENIZER), "float32")
    seen: list[str] = []
    for name in ("blocks.0", "blocks.1.attention", "blocks.1.mlp.up", "blocks.0.output_norm"):
        assert model.runs_on_kernels
        hook = model.get_submodule(name).register_forward_hook(lambda *a, n=name: seen.append(n))
        assert not model.runs_on_kernels
        generator_of(model).generate("春", max_new_tokens=1)
        hook.remove()
    assert sorted(set(seen)) == sorted(
        ["blocks.0", "blocks.1.attention", "blocks.1.mlp.up", "blocks.0.output_norm"]
    )


def test_each_weight_is_freed_as_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(TOKENIZER)
    layers = [weakref.ref(m) for m in model.modules() if isinstance(m, nn.Linear)]
    alive: list[int] = []
    pack = kernels.PackedLinear.pack

    def watched(linear: nn.Linear, precision: Precision) -> kernels.PackedLinear:
        gc.collect()
        alive.append(sum(layer() is not None for layer in layers))
        return pack(linear, precision)

    monkeypatch.setattr(kernels.PackedLinear, "pack", watched)
    kernels.pack_model(model, "int8")
    assert alive == list(range(len(layers), 0, -1))


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_packed_model_says_why_it_takes_no_other_dtype(precision: str) -> None:
    model = kernels.pack_model(tiny_model(TOKENIZER), precision)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for change in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match=f"packed as {precision}, beside which") as e:
            change()
        assert "\n" not in str(e.value)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    model.float()
    model.to("cpu")


@needs_kernels
def test_packing_a_mapped_model_takes_no_second_copy(tmp_path: Path) -> None:
    """Peak memory of a float32 file of 100 MB, mapped and then packed by the Generator."""
    code = """
import resource, sys, torch
from gpt2ml_torch import GPT2ML, GPT2MLConfig, Generator, kernels
path = sys.argv[1]
kernels.load_kernels()
config = GPT2MLConfig(vocab_size=4000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                      intermediate_size=2048)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[2] == "save":
    GPT2ML(config).save_pretrained(path)
else:
    with torch.device("meta"):
        GPT2ML(config)  # some versions of PyTorch import 30 MB of code for it
    before = resident()
    model = GPT2ML.from_pretrained(path)
    kernels.pack_for_decoding(model)
    assert model.packed == "float32"
    print(resident() - before)
"""
    path = tmp_path / "m"
    for step in ("save", "pack"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), step],
            capture_output=True,
            text=True,
            check=True,
        )
    size = path.stat().st_size
    with ModelFile.open(path) as file:
        largest = max(info.size for info in file.tensors.values())
    assert size * 0.8 < int(done.stdout) < size + largest + (16 << 20)
    assert os.path.getsize(path) == size
