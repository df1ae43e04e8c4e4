"""A request of the scheduler: one text under way, and how far it is."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.serving.handle import Handle
from gpt2ml_torch.serving.prefixes import PrefixCopy


@dataclasses.dataclass(eq=False)
class Request:
    """One text: its settings, its state, and its caller's handle."""

    text: Text
    handle: Handle
    top_logprobs: int | None
    prompt_logprobs: bool
    only_read: bool
    row: int = 0  # of the cache, while its window is being read
    read: int = 0  # tokens of its window that the row holds by then
    copy: PrefixCopy | None = None  # of its window, for the prefix cache
    after: tuple[int, Tensor] | None = None  # how long the window was, and the logits after it
    cancelled: bool = False

    @property
    def window(self) -> list[int]:
        return self.text.ids[self.text.start :]

    @property
    def adapter(self) -> str | None:
        return self.text.config.adapter

    @property
    def begun(self) -> bool:
        """Whether a token of its continuation was written."""
        return self.text.count > 0
