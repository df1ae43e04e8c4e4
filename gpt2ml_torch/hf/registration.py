"""Register the model's classes with libraries that look classes up by name."""

from __future__ import annotations

import contextlib
import importlib

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gpt2ml_torch.hf.configuration_gpt2ml import GPT2MLConfig
from gpt2ml_torch.hf.modeling_gpt2ml import GPT2MLForCausalLM, GPT2MLModel, tell_peft


def register() -> None:
    """Register the classes with transformers' Auto classes and peft; calling it again is safe."""
    AutoConfig.register(GPT2MLConfig.model_type, GPT2MLConfig, exist_ok=True)
    AutoModel.register(GPT2MLConfig, GPT2MLModel, exist_ok=True)
    AutoModelForCausalLM.register(GPT2MLConfig, GPT2MLForCausalLM, exist_ok=True)
    # Saving such a model copies its code into the folder, which then loads anywhere.
    GPT2MLConfig.register_for_auto_class()
    GPT2MLModel.register_for_auto_class("AutoModel")
    GPT2MLForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    with contextlib.suppress(ImportError):
        importlib.import_module("peft.utils.constants")
    tell_peft()
