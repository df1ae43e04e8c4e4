"""GPT2_ML in PyTorch: load a converted checkpoint, continue Chinese text, fine-tune."""

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.model import GPT2ML, KVCache

__all__ = ["GPT2ML", "GPT2MLConfig", "KVCache"]
