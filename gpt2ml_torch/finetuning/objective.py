"""From rows to a loss: the model under its precision, logits and cross entropy a chunk at a time.

B batch rows, T tokens, D width, N positions (B x T), V vocabulary.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from gpt2ml_torch.finetuning.data import Rows
from gpt2ml_torch.model import GPT2ML


class Objective(nn.Module):
    """The summed cross entropy of a batch: `objective(rows)` is a float32 scalar, in nats.

    Labels of 0 are left out. Logits exist for `chunk` positions at a time and are made again in the
    backward pass. `mixed`
    computes in bfloat16 with float32 weights. `packed` keeps the documents of a row apart.
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
        with self._precision(rows.token_ids.device):
            h = self.model.hidden_states(
                rows.token_ids,
                positions=rows.positions,
                document_ids=rows.document_ids if self.packed else None,
            )
            return self._summed_loss(h.flatten(0, 1), rows.labels.flatten())

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if not self.mixed:
            return contextlib.nullcontext()
        # Without the cache, which would keep a bfloat16 copy of every weight until the end of the
        # step.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def _summed_loss(self, h: Tensor, labels: Tensor) -> Tensor:
        """(N, D) and (N,) -> a scalar."""
        weight = self.model.token_embedding.weight
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for part, targets in zip(h.split(self.chunk), labels.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                loss = recompute_in_backward(
                    _chunk_loss,
                    part,
                    weight,
                    targets,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                loss = _chunk_loss(part, weight, targets)
            total = total + loss
        return total


def _chunk_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()  # (chunk, V)
    return F.cross_entropy(logits, targets, ignore_index=0, reduction="sum")
