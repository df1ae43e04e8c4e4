"""`import gpt2ml_torch.hf` lets transformers load exported folders without `trust_remote_code`.

It registers the model's classes with transformers' Auto classes, and its layers with peft where
peft is installed. Nothing else in the package imports transformers, and importing the package does
not import this one.
"""

from gpt2ml_torch.hf.configuration_gpt2ml import GPT2MLConfig
from gpt2ml_torch.hf.modeling_gpt2ml import GPT2MLForCausalLM, GPT2MLModel
from gpt2ml_torch.hf.registration import register

__all__ = ["GPT2MLConfig", "GPT2MLForCausalLM", "GPT2MLModel", "register"]

register()
