"""GPT2ML against the TensorFlow reference in float64: the algebra. Every mutant of the algebra must
fail the same comparison.

Compared: the logits of all positions, GPT2ML in eager PyTorch and tests/tf_reference.py in eager
TensorFlow, both in float64 on the CPU, from the same loud weights. The logits are near 5 in size
and agree within 2e-14; the tolerance of 1e-12 leaves room for other processors, and none for a
constant that passed through float32 (1e-5 as a float32 shifts them by 1e-11).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML, KVCache
from tests.helpers.parity import (
    ODD_SIZES,
    exact_logits,
    largest_error,
    loud_model,
    make_model,
    random_ids,
    to_float64,
    to_torch,
)
from tests.tf_reference import Array, Sizes, TFReference, Weights, loud_weights, round_to

TOLERANCE = 1e-12
MARGIN = 1_000_000  # how much farther than the tolerance a mutant must stray

# Every kernel square and every vector as long as any other: here no shape check helps.
SQUARE = Sizes(layers=3, width=48, heads=3, mlp=48, vocab=131, positions=23)


@functools.cache
def square_case() -> tuple[Weights, Array, Tensor]:
    weights = round_to(loud_weights(SQUARE), "float64")
    ids = random_ids(SQUARE)
    return weights, ids, exact_logits(SQUARE, weights, ids)


def error_on_square(model: GPT2ML) -> float:
    _, ids, exact = square_case()
    with torch.no_grad():
        return largest_error(model(to_torch(ids)), exact)


@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
def test_float64_logits_agree(sizes: Sizes) -> None:
    model, weights = loud_model(sizes)
    ids = random_ids(sizes, rows=3)
    exact = exact_logits(sizes, weights, ids)
    assert exact.std() > 0.5, "quiet logits would prove little"
    with torch.no_grad():
        assert largest_error(model(to_torch(ids)), exact) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_float64_logits_agree_for_short_texts(tokens: int) -> None:
    model, weights = loud_model(ODD_SIZES[0])
    ids = random_ids(ODD_SIZES[0], rows=1, tokens=max(tokens, 2))[:, :tokens]
    with torch.no_grad():
        error = largest_error(model(to_torch(ids)), exact_logits(ODD_SIZES[0], weights, ids))
    assert error <= TOLERANCE


def test_float64_logits_agree_at_48_layers_and_heads_of_64() -> None:
    sizes = Sizes(layers=48, width=128, heads=2, mlp=192, vocab=73, positions=21)
    model, weights = loud_model(sizes)
    ids = random_ids(sizes)
    with torch.no_grad():
        error = largest_error(model(to_torch(ids)), exact_logits(sizes, weights, ids))
    assert error <= TOLERANCE


def test_reference_decodes_through_its_own_cache_to_the_same_logits_as_ours() -> None:
    sizes = ODD_SIZES[2]
    model, weights = loud_model(sizes)
    ids = random_ids(sizes, tokens=12)
    reference = TFReference(weights, heads=sizes.heads)
    theirs, tf_cache = reference.decode(ids[:, :5], cache=None)
    cache = KVCache(model.config, batch_size=2, length=12, dtype=torch.float64)
    tokens = to_torch(ids)
    positions = torch.arange(12).expand(2, 12)
    with torch.no_grad():
        ours = model(tokens[:, :5], positions=positions[:, :5], cache=cache)
        assert largest_error(ours, to_float64(theirs)) <= TOLERANCE
        for at in range(5, 12):
            theirs, tf_cache = reference.decode(ids[:, at : at + 1], cache=tf_cache)
            here = slice(at, at + 1)
            ours = model(tokens[:, here], positions=positions[:, here], cache=cache)
            assert largest_error(ours, to_float64(theirs)) <= TOLERANCE


def test_the_square_model_itself_passes() -> None:
    assert error_on_square(make_model(SQUARE, square_case()[0])) <= TOLERANCE


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
    true, norm = model.logits, nn.LayerNorm(SQUARE.width, dtype=torch.float64)
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
    model = make_model(SQUARE, square_case()[0])
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
    weights = dict(square_case()[0])
    WEIGHTS[mutant](weights)
    error = error_on_square(make_model(SQUARE, weights))
    assert error > MARGIN * TOLERANCE, f"{mutant} strays by only {error:.3g}"


def test_the_bias_of_the_keys_is_the_one_weight_logits_do_not_depend_on() -> None:
    """It adds the same to all scores of a query, which softmax ignores: only an exact comparison of
    weights sees it lost.
    """
    weights = dict(square_case()[0])
    set_to_zero(weights, "layer01/key_layer/bias")
    assert error_on_square(make_model(SQUARE, weights)) <= TOLERANCE


CACHE_MUTANTS = {
    "positions of the second chunk one too early": lambda p: p - (p >= 5).long(),
    "second chunk written over the first": lambda p: p % 5,
    "positions of the second chunk one too late": lambda p: p + (p >= 5).long(),
}


@pytest.mark.parametrize("mutant", CACHE_MUTANTS)
def test_bites_on_a_cache_that_is_off(mutant: str) -> None:
    weights, ids, exact = square_case()
    model = make_model(SQUARE, weights)
    cache = KVCache(model.config, batch_size=2, length=SQUARE.positions, dtype=torch.float64)
    tokens = to_torch(ids)[:, :10]
    positions = CACHE_MUTANTS[mutant](torch.arange(10).expand(2, 10))
    with torch.no_grad():
        model(tokens[:, :5], positions=positions[:, :5], cache=cache)
        second = model(tokens[:, 5:], positions=positions[:, 5:], cache=cache)
    assert largest_error(second, exact[:, 5:10]) > MARGIN * TOLERANCE


def test_a_transpose_of_a_kernel_that_is_not_square_is_refused() -> None:
    sizes = ODD_SIZES[0]
    weights = round_to(loud_weights(sizes), "float64")
    transpose(weights, "intermediate")
    with pytest.raises(RuntimeError, match=r"mlp\.up\.weight"):
        make_model(sizes, weights)
