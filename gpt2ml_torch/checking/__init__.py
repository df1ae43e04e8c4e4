"""Proof on the user's own weights and machine: the findings of `gpt2ml check`."""

from gpt2ml_torch.checking.finding import Finding
from gpt2ml_torch.checking.run import check_model

__all__ = ["Finding", "check_model"]
