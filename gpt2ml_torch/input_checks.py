"""Checks of a model's inputs: token ids, positions, documents and cache."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kv_cache import KVCache


def check_inputs(
    config: GPT2MLConfig,
    dtype: torch.dtype,
    token_ids: Tensor,
    positions: Tensor | None,
    cache: KVCache | None,
    document_ids: Tensor | None,
) -> None:
    """Raise `ValueError` for inputs that a model of these sizes, computing in `dtype`, can't take.

    Inside `torch.compile` ids and positions out of range raise `RuntimeError` when the graph runs.
    """
    if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"token_ids is {token_ids.dtype} of shape {tuple(token_ids.shape)}; "
            "expected integers of shape (batch, tokens)"
        )
    limit = config.max_position_embeddings if cache is None else cache.length
    what = "positions" if cache is None else "cache slots"
    if positions is None and token_ids.shape[1] > limit:
        raise ValueError(
            f"{token_ids.shape[1]} tokens were given; the model has {limit} {what}: "
            "cut the text, or decode it in windows with Generator"
        )
    for name, value in (("positions", positions), ("document_ids", document_ids)):
        if value is not None and value.shape != token_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected the shape of token_ids, "
                f"{tuple(token_ids.shape)}"
            )
    if positions is not None and positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"positions is {positions.dtype}; expected integers")
    if cache is not None and document_ids is not None:
        raise ValueError("document_ids and a cache exclude each other; give one of them")
    if cache is not None:
        _check_cache(config, dtype, cache, rows=token_ids.shape[0])
    _check_range(token_ids, config.vocab_size, "token id")
    if positions is not None:
        _check_range(positions, limit, "position")


def _check_cache(config: GPT2MLConfig, dtype: torch.dtype, cache: KVCache, *, rows: int) -> None:
    heads, size = config.num_attention_heads, config.head_size
    found = tuple(cache.keys.shape)
    expected = (config.num_hidden_layers, rows, cache.length, heads, size)
    if found != expected:
        raise ValueError(
            f"the cache has shape {found} (layers, rows, slots, heads, head size); this model "
            f"with {rows} rows of tokens needs {expected}: make a KVCache for them"
        )
    if cache.keys.dtype != dtype:
        raise ValueError(
            f"the cache is {cache.keys.dtype} and the model {dtype}; make the cache with "
            "dtype=model.dtype"
        )


def _check_range(values: Tensor, limit: int, what: str) -> None:
    """Raise unless 0 <= values < limit; in a compiled graph, by an assertion of the graph."""
    if torch.compiler.is_compiling():
        inside = ((values >= 0) & (values < limit)).all()
        torch._assert_async(inside, f"{what} out of range: expected 0 <= {what} < {limit}")
    elif values.numel():
        low, high = (int(bound) for bound in torch.aminmax(values))
        if low < 0 or high >= limit:
            found = low if low < 0 else high
            raise ValueError(f"{what} {found} is out of range; expected 0 <= {what} < {limit}")
