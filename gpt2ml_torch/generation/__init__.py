"""Continue texts: the configuration, the compiled engine, and the Generator on top of them."""

from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.generator import Generator
from gpt2ml_torch.generation.scoring import Score
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Completion

__all__ = ["Completion", "GenerationConfig", "Generator", "Score", "Stats"]
