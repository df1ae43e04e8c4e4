"""Text to ids and back."""

from gpt2ml_torch.tokenizer.decoding import StreamDecoder
from gpt2ml_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
