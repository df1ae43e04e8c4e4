"""The training loss, computed in chunks so that the logits are never all in memory.

For a batch of 8 x 1,024 tokens and the published vocabulary they would take 660 MiB.

Shapes:
    B  batch rows       T  tokens        D  width
    N  B * T            V  vocabulary
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.model import GPT2ML


class Objective(nn.Module):
    """The summed cross entropy of a batch in nats: `objective(rows)` is a scalar.

    Positions with label 0 are ignored. The logits are computed for `chunk` positions at a time and
    recomputed in the backward pass, unless a single chunk covers the batch. The sum is accumulated
    in float32 (float64 for a float64 model). With `mixed`, activations are bfloat16 for weights of
    any dtype; with `packed`, attention does not cross the documents of a row.

    Source: imcaspar/gpt2-ml, train/modeling.py, lm_loss.
    """

    def __init__(
        self, model: GPT2ML, *, chunk: int = 128, mixed: bool = False, packed: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.mixed = mixed
        self.packed = packed

    def forward(self, rows: Rows) -> Tensor:
        """Return the loss; raises `ValueError` unless every field of `rows` is (B, T)."""
        shapes = {tuple(field.shape) for field in rows}
        if len(shapes) > 1 or rows.token_ids.ndim != 2:
            found = ", ".join(map(str, sorted(shapes)))
            raise ValueError(f"rows of shape {found}; expected (B, T) for all fields")
        with self._precision(rows.token_ids.device):
            h = self.model.hidden_states(
                rows.token_ids,
                positions=rows.positions,
                document_ids=rows.document_ids if self.packed else None,
            )  # (B, T, D)
            return self._summed_loss(h.flatten(0, 1), rows.labels.flatten())

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if not self.mixed:
            return contextlib.nullcontext()
        # autocast's cache would keep a bfloat16 copy of every weight until the step ends.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def _summed_loss(self, h: Tensor, labels: Tensor) -> Tensor:
        """(N, D) and (N,) -> a scalar."""
        if len(h) <= self.chunk:
            return self._chunk_loss(h, labels)
        losses = []
        for part in zip(h.split(self.chunk), labels.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                loss = recompute_in_backward(
                    self._chunk_loss,
                    *part,
                    use_reentrant=False,
                    preserve_rng_state=False,  # the recomputed part draws nothing
                )
            else:
                loss = self._chunk_loss(*part)
            losses.append(loss)
        return torch.stack(losses).sum()

    def _chunk_loss(self, h: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.logits(h)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=0, reduction="sum")
