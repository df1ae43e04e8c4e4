"""The sizes of a GPT2_ML, validated once for all other modules.

Field names are Hugging Face's, because users know them. The converter reads the two JSON dialects
in which the original checkpoints circulate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 1_000  # anything above is a damaged or hostile file, not a model
MAX_DIMENSION = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2MLConfig:
    """Sizes and constants of a GPT2_ML.

    Raises `ValueError` for sizes that no model can have, such as a width that is not divisible by
    the number of heads.
    Source: imcaspar/gpt2-ml, train/modeling.py, GroverConfig.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 1024
    hidden_dropout_prob: float = 0.1
    initializer_range: float = 0.0141421

    # Constants of the architecture. No published model has others, so they are not fields, which a
    # file could get wrong.
    layer_norm_eps = 1e-5
    mlp_initializer_range = 0.02
    pad_token_id = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                limit = MAX_LAYERS if field.name == "num_hidden_layers" else MAX_DIMENSION
                if type(value) is not int or not 1 <= value <= limit:
                    raise ValueError(
                        f"{field.name} is {value!r}; expected a whole number from 1 to {limit}"
                    )
            elif type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{field.name} is {value!r}; expected a number from 0 up to 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """The number of weights, including the embeddings; the tied output is counted once."""
        width, mlp = self.hidden_size, self.intermediate_size
        attention = 4 * (width * width + width)
        feed_forward = 2 * width * mlp + mlp + width
        norms = 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings + 2) * width
        return embeddings + self.num_hidden_layers * (attention + feed_forward + norms)

    @classmethod
    def base(cls, *, vocab_size: int = 21130) -> GPT2MLConfig:
        """12 layers, width 768: the smallest size of the original repository."""
        return cls._sized(12, 768, vocab_size)

    @classmethod
    def large(cls, *, vocab_size: int = 21130) -> GPT2MLConfig:
        """24 layers, width 1024."""
        return cls._sized(24, 1024, vocab_size)

    @classmethod
    def mega(cls, *, vocab_size: int = 21130) -> GPT2MLConfig:
        """48 layers, width 1536: the published model; 21,130 rows for 15G, 8,021 for 30G."""
        return cls._sized(48, 1536, vocab_size)

    @classmethod
    def _sized(cls, layers: int, width: int, vocab_size: int) -> GPT2MLConfig:
        return cls(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT2MLConfig:
        """The inverse of `to_dict`; raises `ValueError` for missing or unknown fields."""
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(
                f"not a configuration of this model: unknown fields {unknown}, "
                f"missing fields {missing}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, int | float]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)
