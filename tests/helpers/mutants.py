"""Mistakes that a conversion could make without any shape noticing, made in a right model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML

State = dict[str, Tensor]


def _blocks(state: State) -> range:
    return range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks")))


def _parts(state: State, order: tuple[int, int, int]) -> None:
    for name in [n for n in state if "attention.qkv" in n]:
        parts = state[name].chunk(3)
        state[name] = torch.cat([parts[index] for index in order])


def _transpose(state: State, *, only_queries: bool) -> None:
    for index in _blocks(state):
        name = f"blocks.{index}.attention.qkv.weight"
        query, key, value = state[name].chunk(3)
        others = [key, value] if only_queries else [key.T, value.T]
        state[name] = torch.cat([query.T, *others])
        if not only_queries:
            output = f"blocks.{index}.attention.output.weight"
            state[output] = state[output].T.contiguous()


def _exchange(state: State, one: str, other: str) -> None:
    for name in [n for n in state if one in n]:
        counterpart = name.replace(one, other)
        state[name], state[counterpart] = state[counterpart], state[name]


def _shift_blocks(state: State, by: int) -> None:
    count, before = len(_blocks(state)), dict(state)
    for name in [n for n in state if n.startswith("blocks.")]:
        _, index, rest = name.split(".", 2)
        state[name] = before[f"blocks.{(int(index) + by) % count}.{rest}"]


def _roll(state: State, name: str, by: int) -> None:
    state[name] = state[name].roll(by, 0)


def _fill(state: State, part: str, value: float) -> None:
    for name in [n for n in state if part in n]:
        state[name] = torch.full_like(state[name], value)


def _random(state: State, *, norms: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if weight.ndim == 2 or norms:
            noise = torch.randn(weight.shape, generator=generator)
            state[name] = noise * weight.std() + weight.mean()


def _untrained(state: State) -> None:
    _random(state, norms=False)
    _fill(state, "norm.weight", 1.0)
    _fill(state, "bias", 0.0)


def _repeat_a_block(state: State) -> None:
    for name in [n for n in state if n.startswith("blocks.3.")]:
        state[name] = state[name.replace("blocks.3.", "blocks.2.")].clone()


# Mutants of the weights by the finding that fails, whichever comes first.
OF_WEIGHTS: dict[str, tuple[Callable[[State], None], str]] = {
    "queries and keys exchanged": (lambda s: _parts(s, (1, 0, 2)), "order of the weights"),
    "keys and values exchanged": (lambda s: _parts(s, (0, 2, 1)), "statistics"),
    "square kernels not transposed": (
        lambda s: _transpose(s, only_queries=False),
        "order of the weights",
    ),
    "query kernels not transposed": (lambda s: _transpose(s, only_queries=True), "statistics"),
    "norms of each block exchanged": (
        lambda s: _exchange(s, "mlp_norm", "output_norm"),
        "vocabulary and language",
    ),
    "gains and biases of norms exchanged": (
        lambda s: _exchange(s, "norm.weight", "norm.bias"),
        "statistics",
    ),
    "blocks one earlier": (lambda s: _shift_blocks(s, 1), "order of the weights"),
    "blocks one later": (lambda s: _shift_blocks(s, -1), "order of the weights"),
    "a block twice, another lost": (_repeat_a_block, "statistics"),
    "a block zeroed": (lambda s: _fill(s, "blocks.3.", 0.0), "statistics"),
    "one matrix zeroed": (lambda s: _fill(s, "blocks.2.mlp.up.weight", 0.0), "statistics"),
    "random matrices": (lambda s: _random(s, norms=False), "statistics"),
    "all weights random": (lambda s: _random(s, norms=True), "statistics"),
    "never trained": (_untrained, "statistics"),
    "positions one later": (
        lambda s: _roll(s, "position_embedding.weight", 1),
        "order of the weights",
    ),
    "vocabulary one row off": (
        lambda s: _roll(s, "token_embedding.weight", 1),
        "vocabulary and language",
    ),
    "not a number": (
        lambda s: s["blocks.1.mlp.down.bias"].__setitem__(3, float("nan")),
        "finite numbers",
    ),
}
# What the weights alone can't tell, and what little it moves the loss (docs/checking.md).
UNSEEN: dict[str, Callable[[State], None]] = {
    "biases of the queries lost": lambda s: [  # type: ignore[dict-item]
        s[n][: len(s[n]) // 3].zero_() for n in s if n.endswith("qkv.bias")
    ],
}


def tanh_gelu(model: Any) -> None:
    for block in model.blocks:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down(nn.functional.gelu(mlp.up(x), approximate="tanh"))


def other_epsilon(model: GPT2ML) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12


# Mutants of the code, which no file shows.
OF_CODE = {"tanh GELU": tanh_gelu, "LayerNorm epsilon 1e-12": other_epsilon}
