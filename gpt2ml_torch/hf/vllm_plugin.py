"""What vLLM needs to serve exported folders; it finds both through the package's entry points.

vLLM 0.32 looks classes up as attributes of transformers, and takes no `suppress_tokens` from
generation_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from vllm.v1.sample.logits_processor import LogitsProcessor

from gpt2ml_torch.hf import GPT2MLConfig, GPT2MLForCausalLM, GPT2MLModel, register


def register_in_vllm() -> None:
    """Entry point of `vllm.general_plugins`: exported folders load without their own code."""
    register()
    for class_ in (GPT2MLConfig, GPT2MLModel, GPT2MLForCausalLM):
        setattr(transformers, class_.__name__, class_)


class SuppressTokens(LogitsProcessor):
    """Entry point of `vllm.logits_processors`: `suppress_tokens` of a GPT2_ML is never written.

    Other models' logits stay as they are.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        ids: list[int] = []
        if getattr(model.hf_config, "model_type", None) == GPT2MLConfig.model_type:
            path = Path(model.model) / "generation_config.json"
            ids = json.loads(path.read_bytes()).get("suppress_tokens", []) if path.is_file() else []
        self._ids = torch.tensor(ids, dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Ban the ids in every row, (rows, V)."""
        return logits.index_fill_(1, self._ids, float("-inf")) if len(self._ids) else logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing: the ids are the same for every request."""
