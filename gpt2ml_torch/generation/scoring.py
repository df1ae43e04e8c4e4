"""The probability of given texts under the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.finite import non_finite_logits
from gpt2ml_torch.model import GPT2ML

_CHUNK = 128  # positions whose logits, (B, 128, V) in float32, are in memory at once
_SLIDING_TOKENS = 65_536  # the most tokens that are read again for a text that is too long


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-likelihood of a text after its first token, which nothing predicts.

    `token_logprobs` are natural logarithms, one for each token except the first.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]

    @property
    def log_likelihood(self) -> float:
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss for each token; NaN for a text of one token."""
        if not self.token_logprobs:
            return math.nan
        return math.exp(-self.log_likelihood / len(self.token_logprobs))


def token_logprobs(
    model: GPT2ML, texts: Sequence[Sequence[int]], *, batch_size: int
) -> list[list[float]]:
    """Natural logarithms of the probability of every token except the first, for each text.

    A token is predicted from all tokens before it, or from as many as the model has positions for.
    If that would read more than `_SLIDING_TOKENS` tokens again, windows slide by more than one
    token; some tokens then have less context, but at least half a window.

    Raises `ValueError` for logits that are not finite.
    """
    limit = model.config.max_position_embeddings
    spans = []  # (text, start and end of the window, first token that is scored in it)
    for number, ids in enumerate(texts):
        slides = max(len(ids) - limit - 1, 0)
        stride = max(min(-(-slides * limit // _SLIDING_TOKENS), limit // 2), 1)
        counted = 1
        while counted < len(ids):
            end = min(counted + stride if counted > 1 else limit + 1, len(ids))
            spans.append((number, max(end - limit - 1, 0), end, counted))
            counted = end
    results: list[list[float]] = [[] for _ in texts]
    # Longest first, so that the rows of a batch have nearly the same length.
    order = sorted(range(len(spans)), key=lambda index: spans[index][1] - spans[index][2])
    values: dict[int, list[float]] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        windows = [list(texts[spans[i][0]][spans[i][1] : spans[i][2]]) for i in batch]
        for index, row in zip(batch, _window_logprobs(model, windows), strict=True):
            _, start, _, counted = spans[index]
            values[index] = row[counted - start - 1 :]
            if not all(map(math.isfinite, row)):
                raise non_finite_logits(model)
    for index, (number, *_) in enumerate(spans):
        results[number] += values[index]
    return results


@torch.inference_mode()
def _window_logprobs(model: GPT2ML, windows: Sequence[list[int]]) -> list[list[float]]:
    """The log-probabilities of the tokens in windows, each except its first token.

    A window may have one token more than the model has positions, since the last token is only
    predicted. Padding is on the right, where no other token attends to it.
    """
    longest = max(map(len, windows))
    padded = [window + [0] * (longest - len(window)) for window in windows]
    tokens = torch.tensor(padded, device=model.device)  # (B, T + 1)
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    h = model.hidden_states(ids)  # (B, T, D)
    rows: list[Tensor] = []
    for first in range(0, longest - 1, _CHUNK):
        last = min(first + _CHUNK, longest - 1)
        log_p = model.logits(h[:, first:last]).float().log_softmax(-1)
        rows.append(log_p.gather(-1, labels[:, first:last, None])[..., 0])
    joined = torch.cat(rows, dim=1).tolist()
    return [row[: len(window) - 1] for row, window in zip(joined, windows, strict=True)]
