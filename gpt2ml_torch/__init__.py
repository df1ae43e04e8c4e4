"""GPT2_ML in PyTorch: load a converted checkpoint, continue Chinese text, fine-tune."""

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.model import GPT2ML, KVCache
from gpt2ml_torch.tokenizer import StreamDecoder, Tokenizer

__all__ = ["GPT2ML", "GPT2MLConfig", "KVCache", "StreamDecoder", "Tokenizer"]
