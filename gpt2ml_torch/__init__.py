"""GPT2_ML in PyTorch: load a converted checkpoint, continue Chinese text, fine-tune."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2ml_torch.config import GPT2MLConfig
    from gpt2ml_torch.generation import Completion, GenerationConfig, Generator
    from gpt2ml_torch.kv_cache import KVCache
    from gpt2ml_torch.model import GPT2ML
    from gpt2ml_torch.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "GPT2ML",
    "Completion",
    "GPT2MLConfig",
    "GenerationConfig",
    "Generator",
    "KVCache",
    "StreamDecoder",
    "Tokenizer",
]

__version__ = "0.1.0"  # setup.cfg takes it from here

_MODULES = {
    "Completion": "generation",
    "GPT2ML": "model",
    "GPT2MLConfig": "config",
    "GenerationConfig": "generation",
    "Generator": "generation",
    "KVCache": "kv_cache",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `gpt2ml --help` need not wait for PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
