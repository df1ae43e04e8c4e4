"""Plugins with which vLLM serves exported folders; it finds them by the package's entry points.

They are needed because vLLM 0.32 looks classes up as attributes of transformers, and ignores
`suppress_tokens` in generation_config.json.
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
    """Entry point of `vllm.logits_processors`: ban a GPT2_ML's `suppress_tokens`.

    The logits of other models stay as they are.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        ids: list[int] = []
        if getattr(model.hf_config, "model_type", None) == GPT2MLConfig.model_type:
            path = Path(model.model) / "generation_config.json"
            ids = json.loads(path.read_bytes()).get("suppress_tokens", []) if path.is_file() else []
        self._ids = torch.tensor(ids, dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the banned ids' logits, (B, V), to minus infinity in every row, in place."""
        return logits.index_fill_(1, self._ids, float("-inf")) if len(self._ids) else logits

    def is_argmax_invariant(self) -> bool:
        """False: a ban can change the most probable token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Do nothing: the ids are the same for every request."""
