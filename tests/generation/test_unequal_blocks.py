"""Compiled steps of models whose blocks are not all alike: the logits of the eager steps.

A block's compiled code is reused for its equals; each kind of difference here is one that PyTorch's
own check of reuse may overlook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpt2ml_torch import GPT2ML, Generator, KVCache, kernels
from gpt2ml_torch.generation import engine
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.regions import are_equal
from gpt2ml_torch.model import MLP, Attention
from tests.helpers.tiny import tiny_model, tiny_tokenizer

LAYERS = 6
needs_compiler = pytest.mark.skipif(
    engine.why_no_compiler() is not None, reason=str(engine.why_no_compiler())
)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Reversed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -3 * weight


class Scaled(nn.Linear):
    """A constant of Python, as an adapter's scaling."""

    scaling: dict[str, float]

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling["default"] * super().forward(x)


def add_lora(block: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["qkv", "up"], r=2, init_lora_weights=False)
        peft.inject_adapter_in_model(config, block)


def add_forward_hook(block: Any) -> None:
    block.mlp.up.register_forward_hook(lambda module, inputs, output: output * 1.5)


def add_forward_pre_hook(block: Any) -> None:
    block.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.25,))


def replace_linear(block: Any) -> None:
    old = block.mlp.down
    block.mlp.down = Doubled(old.in_features, old.out_features)
    block.mlp.down.load_state_dict(old.state_dict())


def change_class(block: Any) -> None:
    block.attention.output.__class__ = Doubled


def change_constant(block: Any) -> None:
    block.mlp.up.__class__ = Scaled
    block.mlp.up.scaling = {"default": 3.0}


def change_epsilon(block: Any) -> None:
    block.output_norm.eps = 0.5


def widen(block: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        block.mlp.up, block.mlp.down = nn.Linear(32, 80), nn.Linear(80, 32)


def drop_bias(block: Any) -> None:
    block.mlp.down.bias = None


def add_buffer(block: Any) -> None:
    block.mlp.register_buffer("shift", torch.tensor(0.75))
    block.mlp.forward = lambda x: MLP.forward(block.mlp, x) * block.mlp.shift


def change_heads(block: Any) -> None:
    class Sharper(Attention):
        def forward(self, h: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(h * 1.5, **kwargs)

    block.attention.__class__ = Sharper


def add_parametrization(block: Any) -> None:
    parametrize.register_parametrization(block.mlp.up, "weight", Reversed())


def freeze(block: Any) -> None:
    block.requires_grad_(False)


def replace_norm(block: Any) -> None:
    block.mlp_norm = nn.Identity()


CHANGES: list[Callable[[Any], None]] = [
    add_lora,
    add_forward_hook,
    add_forward_pre_hook,
    replace_linear,
    change_class,
    change_constant,
    change_epsilon,
    widen,
    drop_bias,
    add_buffer,
    change_heads,
    add_parametrization,
    freeze,
    replace_norm,
]


# Each at one place, and some at the first block, which is traced, and at the last too.
PLACES = [(change, 3) for change in CHANGES] + [
    (change, place) for change in (add_lora, add_forward_hook, change_class) for place in (0, 5)
]


def plain_model() -> GPT2ML:
    """Its biases are not zero, so that it matters when one is missing."""
    model = tiny_model(tiny_tokenizer(), layers=LAYERS)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3)
    return model


def changed_model(change: Callable[[Any], None], place: int) -> GPT2ML:
    model = plain_model()
    change(model.blocks[place])
    return model.eval()


def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code: what is wrong goes wrong there."""
    real = torch.compile

    def compile(function: Any, *, options: Any, **others: Any) -> Any:
        return real(function, backend="eager", **others)

    monkeypatch.setattr(torch, "compile", compile)


def steps(model: GPT2ML, *, compile: bool) -> Tensor:
    used = Engine(model, compile=compile)
    cache = used.new_cache(1, 16)
    logits = used.prefill([104, 107, 110], cache)
    assert used.compiled == compile
    return logits


@needs_compiler
@pytest.mark.parametrize(("change", "place"), PLACES)
def test_compiled_steps_see_what_is_different_in_one_block(
    change: Callable[[Any], None], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    eager_backend(monkeypatch)
    model = changed_model(change, place)
    plain, expected = steps(plain_model(), compile=False), steps(model, compile=False)
    assert change is freeze or not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(steps(model, compile=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, LAYERS - 1])
@pytest.mark.parametrize("change", [add_lora, add_forward_hook, change_constant])
def test_a_model_compiled_by_its_user_sees_them_too(
    change: Callable[[Any], None], place: int
) -> None:
    torch.compiler.reset()
    model = changed_model(change, place)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.tensor([[104, 107, 110]])
    with torch.no_grad():
        caches = [KVCache(model.config, batch_size=1, length=8) for _ in range(2)]
        torch.testing.assert_close(compiled(ids, cache=caches[0]), model(ids, cache=caches[1]))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_difference_in_one_block_is_noticed(change: Callable[[Any], None]) -> None:
    assert are_equal(plain_model().blocks)
    for place in (0, 2, LAYERS - 1):
        assert not are_equal(changed_model(change, place).blocks)


def test_a_training_mode_of_its_own_is_a_difference() -> None:
    model = plain_model()
    model.blocks[2].dropout.train()
    assert not are_equal(model.blocks)


def test_blocks_with_the_same_change_are_equal() -> None:
    model = plain_model()
    for block in model.blocks:
        change_epsilon(block)
        widen(block)
    assert are_equal(model.blocks)


@needs_compiler
def test_layers_changed_between_two_calls_are_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.compiler.reset()
    eager_backend(monkeypatch)
    model = tiny_model(tiny_tokenizer(), layers=LAYERS)
    generator = Generator(model, tiny_tokenizer())
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    plain = generator.generate("今天", **options)
    model.blocks[2].register_forward_hook(lambda module, inputs, output: -output)
    expected = Generator(model, tiny_tokenizer(), compile=False).generate("今天", **options)
    assert expected != plain
    assert generator.generate("今天", **options) == expected


@pytest.mark.skipif(not kernels.load_kernels(), reason="the kernels could not be built")
@pytest.mark.parametrize(
    "change", [add_forward_hook, add_forward_pre_hook, change_epsilon, replace_norm, change_heads]
)
def test_a_packed_model_with_a_changed_block_does_not_run_as_one_operator(
    change: Callable[[Any], None],
) -> None:
    model = kernels.pack_model(plain_model(), "float32")
    assert model.runs_on_kernels
    plain = steps(model, compile=False)
    change(model.blocks[3])
    assert not model.runs_on_kernels
    found, expected = steps(model, compile=False), model(torch.tensor([[104, 107, 110]]))[:, -1]
    assert not torch.allclose(found, plain, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
