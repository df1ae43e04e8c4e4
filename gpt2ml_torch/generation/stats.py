"""Speed statistics of generation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Stats:
    """Adds up over the calls it is handed to; each batch's first step, which may compile, is left
    out of the steps.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    assistant_steps: int = 0  # of the model that guesses, in the same seconds
