"""Detect logits that are not finite, and report why."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from gpt2ml_torch.model import GPT2ML


def check_logits(model: GPT2ML, logits: Tensor) -> None:
    """Raise `ValueError` if any logit, (..., V), is NaN or infinite; waits for a GPU."""
    # One pass without a tensor of flags: a sum is finite only if every term is.
    if not bool(logits.sum().isfinite()) and not bool(logits.isfinite().all()):
        raise non_finite_logits(model)


def non_finite_logits(model: GPT2ML) -> ValueError:
    """The error for NaN or infinite logits; it names a weight that holds such values, if any."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return ValueError(f"the model's tensor {name!r} has NaN or infinity{_cure(tensor)}")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ValueError(
        f"the logits overflowed in {dtype}, though all weights are finite; load the model in a "
        "wider precision, such as float32"
    )


def _cure(tensor: Tensor) -> str:
    sound = "the file is damaged: convert or fetch it again"
    if tensor.dtype != torch.float16:
        return f"; {sound}"
    return f" in float16; load it in float32, and if they remain, {sound}"
