"""Text to ids and back."""

from gpt2ml_torch.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
