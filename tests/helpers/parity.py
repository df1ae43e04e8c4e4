"""The PyTorch side of the parity tests: weights carried across, a model written out plainly, and
the 2x rule.

`state_dict_of` is written apart from `convert.mapping`, as the design's table has it, so that
neither can hide the other's mistake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from tests.helpers.reference import Case
from tests.helpers.weights import Array, Sizes, Weights, short_weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Sizes no two dimensions of which agree, with one head and five, wide and narrow MLPs, and more
# layers than 3.
ODD_SIZES = [
    Sizes(layers=3, width=36, heads=3, mlp=100, vocab=211, positions=40),
    Sizes(layers=4, width=51, heads=1, mlp=77, vocab=130, positions=19),
    Sizes(layers=5, width=70, heads=5, mlp=50, vocab=97, positions=33),
    Sizes(layers=6, width=96, heads=4, mlp=385, vocab=301, positions=64),
    Sizes(layers=7, width=22, heads=2, mlp=22, vocab=61, positions=17),
]


def to_torch(array: Array) -> Tensor:
    """A copy as a tensor."""
    return torch.from_numpy(np.array(array))


def to_float64(values: Any) -> Tensor:
    """Logits or gradients of either library as a float64 tensor on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    values = values.numpy() if hasattr(values, "numpy") else values
    return torch.from_numpy(np.asarray(values).astype(np.float64))


def state_dict_of(weights: Mapping[str, Array]) -> dict[str, Tensor]:
    """GPT2ML's state dict for weights (or gradients) under their TensorFlow names."""
    w = {name.removeprefix("newslm/"): to_torch(value) for name, value in weights.items()}
    state = {
        "token_embedding.weight": w["embeddings/word_embed"],
        "position_embedding.weight": w["embeddings/pos_embed"],
        "embedding_norm.weight": w["embeddings/LayerNorm_embed_norm/gamma"],
        "embedding_norm.bias": w["embeddings/LayerNorm_embed_norm/beta"],
    }
    for index in range(sum(name.endswith("/query_layer/kernel") for name in w)):
        tf_layer, layer = f"layer{index:02d}", f"blocks.{index}"
        qkv = [f"{tf_layer}/{name}_layer" for name in ("query", "key", "value")]
        state[f"{layer}.attention.qkv.weight"] = torch.cat([w[f"{n}/kernel"].T for n in qkv])
        state[f"{layer}.attention.qkv.bias"] = torch.cat([w[f"{n}/bias"] for n in qkv])
        for ours, theirs in (
            ("attention.output", "context_projection_layer"),
            ("mlp.up", "intermediate"),
            ("mlp.down", "output"),
        ):
            state[f"{layer}.{ours}.weight"] = w[f"{tf_layer}/{theirs}/kernel"].T.contiguous()
            state[f"{layer}.{ours}.bias"] = w[f"{tf_layer}/{theirs}/bias"]
        for ours, theirs in (("mlp_norm", "ln0"), ("output_norm", "ln1")):
            state[f"{layer}.{ours}.weight"] = w[f"{tf_layer}/LayerNorm_mlp_{theirs}/gamma"]
            state[f"{layer}.{ours}.bias"] = w[f"{tf_layer}/LayerNorm_mlp_{theirs}/beta"]
    return state


def tf_weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `state_dict_of`, for gradients as well: TensorFlow's names, qkv split, kernels
    [in, out].
    """
    norms = {"weight": "gamma", "bias": "beta"}
    dense = {"attention.output": "context_projection_layer", "mlp.up": "intermediate"}
    found = {}
    for key, value in state.items():
        *path, kind = key.split(".")
        scope = f"newslm/layer{int(path[1]):02d}" if path[0] == "blocks" else "newslm/embeddings"
        module = ".".join(path[2:])
        kernel, value = ("kernel", value.T) if value.ndim == 2 else ("bias", value)
        if path[0] in ("token_embedding", "position_embedding"):
            found[f"{scope}/{'word' if path[0][0] == 't' else 'pos'}_embed"] = value.T
        elif path[0] == "embedding_norm":
            found[f"{scope}/LayerNorm_embed_norm/{norms[kind]}"] = value
        elif module == "attention.qkv":
            for name, part in zip(("query", "key", "value"), value.chunk(3, dim=-1), strict=True):
                found[f"{scope}/{name}_layer/{kernel}"] = part
        elif module in ("mlp_norm", "output_norm"):
            number = ("mlp_norm", "output_norm").index(module)
            found[f"{scope}/LayerNorm_mlp_ln{number}/{norms[kind]}"] = value
        else:
            found[f"{scope}/{dense.get(module, 'output')}/{kernel}"] = value
    return found


def config_of(sizes: Sizes, *, dropout: float = 0.1) -> GPT2MLConfig:
    return GPT2MLConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp,
        max_position_embeddings=sizes.positions,
        hidden_dropout_prob=dropout,
    )


def make_model(
    sizes: Sizes,
    weights: Mapping[str, Array],
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.1,
) -> GPT2ML:
    """GPT2ML with these weights, in `dtype` or their own, in evaluation mode."""
    with torch.device("meta"):
        model = GPT2ML(config_of(sizes, dropout=dropout))
    state = {name: weight.to(dtype) for name, weight in state_dict_of(weights).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def model_of(case: Case, dtype: torch.dtype = torch.float64) -> GPT2ML:
    """GPT2ML with the weights of a case, which `dtype` holds exactly."""
    return make_model(case.sizes, case.weights, dtype=dtype)


def inputs_of(case: Case) -> Tensor:
    """The ids whose logits the case knows, (3, positions)."""
    return to_torch(case.ids[:, :-1])


def loud_model(
    sizes: Sizes, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[GPT2ML, Weights]:
    """A model with loud weights that `dtype` holds exactly, and these weights."""
    weights = short_weights(sizes, seed=seed)
    return make_model(sizes, weights, dtype=dtype), weights


def random_ids(sizes: Sizes, *, rows: int = 2, tokens: int | None = None, seed: int = 0) -> Array:
    """Token ids (rows, tokens), with both ends of the vocabulary and pads in the middle and at the
    end.
    """
    tokens = sizes.positions if tokens is None else tokens
    ids = np.random.default_rng(seed).integers(0, sizes.vocab, (rows, tokens))
    ids[0, :2] = sizes.vocab - 1, 0
    ids[-1, -1] = 0
    return ids


def plain_logits(state: Mapping[str, Tensor], token_ids: Tensor, *, heads: int) -> Tensor:
    """What anyone would write in eager PyTorch, op by op in the weights' dtype: the yardstick of
    the 2x rule.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5
        )

    B, T = token_ids.shape
    embedding = state["token_embedding.weight"]
    h = norm(embedding[token_ids] + state["position_embedding.weight"][:T], "embedding_norm")
    future = torch.ones(T, T, dtype=torch.bool, device=token_ids.device).triu(1)
    for index in range(sum(name.endswith("qkv.weight") for name in state)):
        block = f"blocks.{index}"
        joined = linear(h, f"{block}.attention.qkv").chunk(3, dim=-1)
        q, k, v = (t.view(B, T, heads, -1).transpose(1, 2) for t in joined)  # (B, H, T, K)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        a = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = h + linear(a.transpose(1, 2).reshape(B, T, -1), f"{block}.attention.output")
        inner = F.gelu(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.up"))
        h = norm(x + linear(inner, f"{block}.mlp.down"), f"{block}.output_norm")
    return h @ embedding.T


def cross_entropy(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The mean over next tokens that are not 0, in the logits' dtype."""
    return F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=0)


def largest_error(found: Any, exact: Tensor) -> float:
    """The largest absolute difference; NaN anywhere counts as infinite."""
    return _size((to_float64(found) - exact).abs().max())


def typical_error(found: Any, exact: Tensor) -> float:
    """The root mean square difference; NaN anywhere counts as infinite."""
    return _size((to_float64(found) - exact).square().mean().sqrt())


def _size(error: Tensor) -> float:
    return math.inf if error.isnan() else error.item()


def assert_within_twice(found: Any, plain: Any, exact: Tensor, dtype: torch.dtype) -> None:
    """`found` strays from `exact` at most twice as far as `plain`, plus one rounding.

    In the root mean square, which hardly depends on the machine's order of additions: over 75 pairs
    of weights and ids and three dtypes the ratio of two such errors was 0.5 to 1.2. The largest of
    so many errors is a matter of luck, 0.4 to 1.6 there, so only four times as large is too large.
    """
    rounding = torch.finfo(dtype).eps / 2
    for error, times, scale in (
        (typical_error, 2, exact.square().mean().sqrt().item()),
        (largest_error, 4, exact.abs().max().item()),
    ):
        ours, theirs = error(found, exact), error(plain, exact)
        assert ours <= times * theirs + rounding * scale, (
            f"{error.__name__} {ours:.3g}, the plain implementation's {theirs:.3g}, "
            f"one rounding {rounding * scale:.3g}"
        )
