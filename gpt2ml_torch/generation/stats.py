"""Speed statistics of generation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Stats:
    """Sums over all calls that it is passed to.

    The first step of each batch, which may compile, is not counted among the steps.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    assistant_steps: int = 0  # of the draft model, in the same seconds
