"""Log-probabilities of tokens under the model itself, before any constraint.

Shapes:
    T  places       V  vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch.serving.handle import TokenInfo


def token_infos(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenInfo]:
    """The log-probabilities of ids and of the `top` best in their places, from (T, V) logits."""
    if not ids:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    best: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
    if top:
        values, places = logprobs.topk(min(top, logprobs.shape[-1]))
        best = [
            tuple(zip(row_ids, row_values, strict=True))
            for row_ids, row_values in zip(places.tolist(), values.tolist(), strict=True)
        ]
    return [
        TokenInfo(id_, logprob, alternatives)
        for id_, logprob, alternatives in zip(ids, chosen, best, strict=True)
    ]


def wanted_infos(
    logits: Tensor, ids: Sequence[int], wanted: Sequence[int | None]
) -> list[TokenInfo]:
    """As `token_infos`, with a number of alternatives for each place; None: no log-probability."""
    if all(top is None for top in wanted):
        return [TokenInfo(id_, None) for id_ in ids]
    infos = token_infos(logits, ids, max(top or 0 for top in wanted))
    return [
        TokenInfo(info.id, None) if top is None else dataclasses.replace(info, top=info.top[:top])
        for info, top in zip(infos, wanted, strict=True)
    ]
