"""Cross entropy of the next token, without ever holding all logits: at (8, 1024, 21130) they take
660 MiB in float32.

B batch rows, T tokens, D width, N positions (B x (T - 1)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from gpt2ml_torch.model import GPT2ML


class Loss(NamedTuple):
    """The mean over the counted positions (0 where there are none), and how many those are; both
    are scalars.
    """

    mean: Tensor
    targets: Tensor


def next_token_loss(
    model: GPT2ML,
    token_ids: Tensor,
    *,
    loss_mask: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 1024,
) -> Loss:
    """Mean cross entropy of `token_ids[:, 1:]` given what stands before, in nats, where the target
    is not [PAD].

    `token_ids` and `loss_mask` are (B, T); a false mask leaves that token out as a target (a
    prompt). `positions`, (B, T - 1), are those of the inputs. Logits are made for `chunk_size`
    positions at a time and made again in the backward pass; where one chunk holds all, they are
    kept. Raises `ValueError` for shapes that do not fit. Source: imcaspar/gpt2-ml,
    train/modeling.py, lm_loss.
    """
    if token_ids.ndim != 2 or token_ids.shape[1] < 2:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)}; "
            "expected (rows, tokens) with 2 tokens or more"
        )
    if loss_mask is not None and loss_mask.shape != token_ids.shape:
        raise ValueError(
            f"loss_mask has shape {tuple(loss_mask.shape)}; "
            f"expected that of token_ids, {tuple(token_ids.shape)}"
        )
    targets = token_ids[:, 1:]  # (B, T - 1)
    if loss_mask is not None:
        targets = targets.masked_fill(~loss_mask[:, 1:].bool(), model.config.pad_token_id)
    h = model.hidden_states(token_ids[:, :-1], positions=positions)  # (B, T - 1, D)
    total = _summed_loss(model, h.flatten(0, 1), targets.flatten(), chunk_size)
    counted = (targets != model.config.pad_token_id).sum()
    return Loss(total / counted.clamp(min=1), counted)


def _summed_loss(model: GPT2ML, h: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The sum over positions, (N, D) and (N,) -> a float32 scalar (float64 for a float64 model)."""
    if h.shape[0] <= chunk_size or not torch.is_grad_enabled():
        parts = zip(h.split(chunk_size), targets.split(chunk_size), strict=True)
        return torch.stack([_chunk_loss(model, *part) for part in parts]).sum()
    losses = [
        recompute_in_backward(_chunk_loss, model, *part, use_reentrant=False)
        for part in zip(h.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(model: GPT2ML, h: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(h)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=model.config.pad_token_id, reduction="sum")
