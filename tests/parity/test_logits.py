"""GPT2ML against the TensorFlow reference in float64: the algebra. Every mutant of the algebra must
fail the same comparison.

Compared: the logits of all positions, GPT2ML in eager PyTorch on the CPU or CUDA and
scripts/tf_model.py in eager TensorFlow on the CPU (live, or from tests/golden), both in float64,
from the same loud weights. The logits are near 5 in size and agree within 2e-14; the tolerance of
1e-12 leaves room for other processors, and none for a constant that passed through float32 (1e-5 as
a float32 shifts them by 1e-11). On CUDA four times as much is allowed: the products add in another
order, in blocks, and exp and erf may be off by two units in the last place instead of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML, KVCache
from tests.helpers.parity import (
    ODD_SIZES,
    inputs_of,
    largest_error,
    make_model,
    model_of,
    to_float64,
)
from tests.helpers.reference import GOLDEN, Case
from tests.helpers.weights import Sizes, Weights

TOLERANCE = 1e-12
OTHER_ORDER = 4  # times the tolerance, where sums are taken in another order than on the CPU
MARGIN = 1_000_000  # how much farther than the tolerance a mutant must stray

CASES = [
    *GOLDEN.values(),
    *map(Case, ODD_SIZES),
    Case(Sizes(layers=48, width=128, heads=2, mlp=192, vocab=73, positions=21)),
]
SQUARE = GOLDEN["square"]


def tolerance_on(device: torch.device) -> float:
    return TOLERANCE * (1 if device.type == "cpu" else OTHER_ORDER)


def error_on_square(model: GPT2ML) -> float:
    with torch.no_grad():
        return largest_error(model(inputs_of(SQUARE)), to_float64(SQUARE.logits()))


def square_model(weights: Weights | None = None) -> GPT2ML:
    """With the right weights, unless others are given."""
    return make_model(SQUARE.sizes, weights or SQUARE.weights, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_logits_agree(case: Case, device: torch.device) -> None:
    exact = to_float64(case.logits())
    assert exact.std() > 0.5, "quiet logits would prove little"
    with torch.no_grad():
        found = model_of(case).to(device)(inputs_of(case).to(device))
    assert largest_error(found, exact) <= tolerance_on(device)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_float64_logits_agree_for_short_texts(tokens: int, device: torch.device) -> None:
    case = GOLDEN["odd"]
    with torch.no_grad():
        found = model_of(case).to(device)(inputs_of(case)[:1, :tokens].to(device))
    exact = to_float64(case.logits())[:1, :tokens]
    assert largest_error(found, exact) <= tolerance_on(device)


@pytest.mark.parametrize("case", [GOLDEN["odd"], Case(ODD_SIZES[2])], ids=str)
def test_reference_decodes_through_its_own_cache_to_the_same_logits_as_ours(
    case: Case, device: torch.device
) -> None:
    model, tokens = model_of(case).to(device), inputs_of(case).to(device)
    exact = to_float64(case.cached_logits())
    rows, length = tokens.shape
    cache = KVCache(
        model.config, batch_size=rows, length=length, dtype=torch.float64, device=device
    )
    positions = torch.arange(length, device=device).expand(rows, length)
    for start, end in pairwise([0, *range(5, length + 1)]):
        with torch.no_grad():
            ours = model(tokens[:, start:end], positions=positions[:, start:end], cache=cache)
        assert largest_error(ours, exact[:, start:end]) <= tolerance_on(device)


def test_the_square_model_itself_passes() -> None:
    assert error_on_square(square_model()) <= TOLERANCE


# Mutants of the computation: each takes a correct model (`Any`, since it reaches into the modules)
# and breaks it in one place.


def norms_of(model: GPT2ML) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def tanh_gelu(model: Any) -> None:
    for block in model.blocks:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down(F.gelu(mlp.up(x), approximate="tanh"))


def eps_1e_12(model: Any) -> None:
    for norm in norms_of(model):
        norm.eps = 1e-12


def eps_1e_12_in_one_norm(model: Any) -> None:
    model.blocks[1].mlp_norm.eps = 1e-12


def eps_outside_the_root(model: Any) -> None:
    def forward(x: Tensor, norm: Any) -> Tensor:
        std = x.var(-1, keepdim=True, correction=0).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (std + norm.eps) * norm.weight + norm.bias

    for norm in norms_of(model):
        norm.forward = functools.partial(forward, norm=norm)


def unbiased_variance(model: Any) -> None:
    def forward(x: Tensor, norm: Any) -> Tensor:
        variance = x.var(-1, keepdim=True, correction=1)
        return (x - x.mean(-1, keepdim=True)) * (
            variance + norm.eps
        ).rsqrt() * norm.weight + norm.bias

    for norm in norms_of(model):
        norm.forward = functools.partial(forward, norm=norm)


def swapped_norms(model: Any) -> None:
    for block in model.blocks:
        block.mlp_norm, block.output_norm = block.output_norm, block.mlp_norm


def pre_norm_attention(model: Any) -> None:
    for block in model.blocks:
        attention, norm = block.attention, block.mlp_norm
        true = attention.forward
        attention.forward = lambda h, true=true, norm=norm, **kw: true(norm(h), **kw)


def residual_carries_the_norm(model: Any) -> None:
    """As OpenAI's GPT and BERT would have it."""

    def forward(h: Tensor, *, block: Any, **kw: Tensor | None) -> Tensor:
        x = block.mlp_norm(h + block.attention(h, **kw))
        return block.output_norm(x + block.mlp(x))

    for block in model.blocks:
        block.forward = functools.partial(forward, block=block)


def no_softmax_scale(model: Any) -> None:
    for block in model.blocks:
        size = model.config.hidden_size
        block.attention.qkv.weight[:size] *= model.config.head_size**0.5
        block.attention.qkv.bias[:size] *= model.config.head_size**0.5


def scale_by_the_width(model: Any) -> None:
    for block in model.blocks:
        size = model.config.hidden_size
        block.attention.qkv.weight[:size] /= model.config.num_attention_heads**0.5
        block.attention.qkv.bias[:size] /= model.config.num_attention_heads**0.5


def masked_pads(model: Any) -> None:
    """As bert4keras does."""
    true = model.hidden_states
    seen: list[Tensor] = []

    def hidden_states(token_ids: Tensor, **kw: None) -> Tensor:
        seen[:] = [token_ids]
        return true(token_ids, **kw)

    model.hidden_states = hidden_states
    for block in model.blocks:
        attention = block.attention.forward

        def forward(h: Tensor, *, true: Callable[..., Tensor] = attention, **kw: None) -> Tensor:
            T = h.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool).tril() & (seen[0] != 0)[:, None, :]
            mask = (causal | torch.eye(T, dtype=torch.bool))[:, None]
            return true(h, **{**kw, "mask": mask})

        block.attention.forward = forward


def no_causal_mask(model: Any) -> None:
    for block in model.blocks:
        attention = block.attention.forward
        block.attention.forward = lambda h, true=attention, **kw: true(
            h, **{**kw, "mask": torch.zeros(1, 1, h.shape[1], h.shape[1], dtype=h.dtype)}
        )


def final_norm(model: Any) -> None:
    """As GPT-2 has one."""
    true, norm = model.logits, nn.LayerNorm(SQUARE.sizes.width, dtype=torch.float64)
    model.logits = lambda h: true(norm(h))


def no_embedding_norm(model: Any) -> None:
    model.embedding_norm = nn.Identity()


COMPUTATION = [
    tanh_gelu,
    eps_1e_12,
    eps_1e_12_in_one_norm,
    eps_outside_the_root,
    unbiased_variance,
    swapped_norms,
    pre_norm_attention,
    residual_carries_the_norm,
    no_softmax_scale,
    scale_by_the_width,
    masked_pads,
    no_causal_mask,
    final_norm,
    no_embedding_norm,
]


@pytest.mark.parametrize("mutate", COMPUTATION, ids=lambda f: f.__name__)
def test_bites_on_another_computation(mutate: Callable[[GPT2ML], None]) -> None:
    model = square_model()
    with torch.no_grad():
        mutate(model)
    error = error_on_square(model)
    assert error > MARGIN * TOLERANCE, f"{mutate.__name__} strays by only {error:.3g}"


# Mutants of the weights: what a converter, or a loader, could get wrong without any shape noticing.


def swap(weights: Weights, one: str, other: str) -> None:
    """Exchange everything whose name holds `one` with its counterpart."""
    for name in [n for n in weights if one in n]:
        counterpart = name.replace(one, other)
        weights[name], weights[counterpart] = weights[counterpart], weights[name]


def transpose(weights: Weights, kernel: str) -> None:
    for name in [n for n in weights if n.endswith(f"layer01/{kernel}/kernel")]:
        weights[name] = weights[name].T


def shift_positions(weights: Weights, by: int) -> None:
    name = "newslm/embeddings/pos_embed"
    weights[name] = torch.from_numpy(weights[name]).roll(by, 0).numpy()


def set_to_zero(weights: Weights, ending: str) -> None:
    (name,) = (n for n in weights if n.endswith(ending))
    weights[name] = weights[name] * 0


def set_to_one(weights: Weights, ending: str) -> None:
    (name,) = (n for n in weights if n.endswith(ending))
    weights[name] = weights[name] * 0 + 1


KERNELS = (
    "query_layer",
    "key_layer",
    "value_layer",
    "context_projection_layer",
    "intermediate",
    "output",
)
NORMS = ("layer01/LayerNorm_mlp_ln0", "layer01/LayerNorm_mlp_ln1", "LayerNorm_embed_norm")
WEIGHTS: dict[str, Callable[[Weights], None]] = {
    "swapped query and key": lambda w: swap(w, "query", "key"),
    "swapped key and value": lambda w: swap(w, "key", "value"),
    "swapped query and value": lambda w: swap(w, "query", "value"),
    "swapped ln0 and ln1": lambda w: swap(w, "mlp_ln0", "mlp_ln1"),
    "swapped layers 1 and 2": lambda w: swap(w, "layer01", "layer02"),
    "swapped layers 0 and 2": lambda w: swap(w, "layer00", "layer02"),
    "swapped up and down": lambda w: swap(w, "/intermediate/", "/output/"),
    "swapped gamma and beta": lambda w: swap(w, "gamma", "beta"),
    "positions one too early": lambda w: shift_positions(w, 1),
    "positions one too late": lambda w: shift_positions(w, -1),
    **{f"{k} not transposed": functools.partial(transpose, kernel=k) for k in KERNELS},
    **{
        f"{k} without bias": functools.partial(set_to_zero, ending=f"layer01/{k}/bias")
        for k in KERNELS
        if k != "key_layer"
    },
    **{f"{n} without beta": functools.partial(set_to_zero, ending=f"{n}/beta") for n in NORMS},
    **{f"{n} without gamma": functools.partial(set_to_one, ending=f"{n}/gamma") for n in NORMS},
}


@pytest.mark.parametrize("mutant", WEIGHTS)
def test_bites_on_weights_in_the_wrong_place(mutant: str) -> None:
    weights = SQUARE.weights
    WEIGHTS[mutant](weights)
    error = error_on_square(square_model(weights))
    assert error > MARGIN * TOLERANCE, f"{mutant} strays by only {error:.3g}"


def test_the_bias_of_the_keys_is_the_one_weight_logits_do_not_depend_on() -> None:
    """It adds the same to all scores of a query, which softmax ignores: only an exact comparison of
    weights sees it lost.
    """
    weights = SQUARE.weights
    set_to_zero(weights, "layer01/key_layer/bias")
    assert error_on_square(square_model(weights)) <= TOLERANCE


CACHE_MUTANTS = {
    "positions of the second chunk one too early": lambda p: p - (p >= 5).long(),
    "second chunk written over the first": lambda p: p % 5,
    "positions of the second chunk one too late": lambda p: p + (p >= 5).long(),
}


@pytest.mark.parametrize("mutant", CACHE_MUTANTS)
def test_bites_on_a_cache_that_is_off(mutant: str) -> None:
    model = square_model()
    length = SQUARE.sizes.positions
    cache = KVCache(model.config, batch_size=3, length=length, dtype=torch.float64)
    tokens = inputs_of(SQUARE)[:, :10]
    positions = CACHE_MUTANTS[mutant](torch.arange(10).expand(3, 10))
    with torch.no_grad():
        model(tokens[:, :5], positions=positions[:, :5], cache=cache)
        second = model(tokens[:, 5:], positions=positions[:, 5:], cache=cache)
    exact = to_float64(SQUARE.logits())
    assert largest_error(second, exact[:, 5:10]) > MARGIN * TOLERANCE


def test_a_transpose_of_a_kernel_that_is_not_square_is_refused() -> None:
    case = GOLDEN["odd"]
    weights = case.weights
    transpose(weights, "intermediate")
    with pytest.raises(RuntimeError, match=r"mlp\.up\.weight"):
        make_model(case.sizes, weights)
