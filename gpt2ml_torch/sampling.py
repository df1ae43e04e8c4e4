"""From logits to the next token: pure tensor functions, the same eager, compiled and on any device.

A rule that keeps some tokens sets the logits of the others to -inf. Each row has its own random
stream, a counter-based hash of (key of the row, number of the token, id) in integer arithmetic. So
a row's draws depend neither on other rows nor on the order of execution.

Shapes:
    B  batch rows       V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea and Flood, 2014) as signed integers, as PyTorch requires.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64

_SMALL = 1024  # vocabulary size up to which drawing for all tokens is faster than preselecting some


class Knobs(NamedTuple):
    """The sampling parameters as tensors, so that new values need no recompilation.

    Each is 0-dimensional, for all rows, or (B, 1), one for each row. None switches a rule off. If
    `sample`, a bool, is None or False, the most probable token is taken.
    """

    sample: Tensor | None = None
    temperature: Tensor | None = None  # float32, > 0
    top_k: Tensor | None = None  # int64, >= 1
    top_p: Tensor | None = None  # float32, in (0, 1]
    grover_top_p: Tensor | None = None  # the same, with the original's rule
    min_p: Tensor | None = None  # float32, in [0, 1]
    typical_p: Tensor | None = None  # float32, in (0, 1]


def choose(scores: Tensor, knobs: Knobs, *, keys: Tensor, steps: Tensor) -> Tensor:
    """The next token of each row, (B, V) scores from `process` -> (B,) int64.

    `keys` and `steps`, (B,) int64, are each row's random stream and the number of its next token.
    """
    if knobs.sample is None:
        return scores.argmax(-1)  # of equal scores the lowest id
    if knobs.temperature is not None:
        scores = torch.where(knobs.sample, scores / knobs.temperature, scores)
    if scores.device.type == "cpu" and scores.shape[-1] > _SMALL and knobs.sample.ndim == 0:
        rows = zip(scores.split(1), keys.split(1), steps.split(1), strict=True)
        return torch.cat([_draw_from_few(*row, knobs) for row in rows])
    noise = exponential(keys, steps, torch.arange(scores.shape[-1], device=scores.device))
    noisy = keep(scores, knobs).double() - noise.log_()
    return torch.where(knobs.sample, noisy, scores.double()).argmax(-1)


def _draw_from_few(row: Tensor, key: Tensor, step: Tensor, knobs: Knobs) -> Tensor:
    """As `choose` for one row, (1, V), without work for tokens that can't be drawn.

    Rows are handled one by one, so that none depends on the number of candidates of another.
    """
    if not knobs.sample:
        return row.argmax(-1)
    ids, log_total = candidates(row, knobs)
    kept = keep(row[:, ids], knobs, log_total=log_total)
    noise = exponential(key, step, ids)
    return ids[(kept.double() - noise.log_()).argmax(-1)]


def candidates(row: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor | None]:
    """Ids, ascending, that include all tokens of one row, (1, V), that `keep` would keep.

    Also returns the logarithm of the sum of all exponentials, if the rules need it.
    """
    if knobs.top_k is not None and knobs.top_k <= row.shape[-1]:
        worst = row.topk(int(knobs.top_k)).values[:, -1:]
        return (row >= worst).nonzero()[:, 1], None
    top_p = knobs.grover_top_p if knobs.top_p is None else knobs.top_p
    if top_p is not None and knobs.typical_p is None:
        log_total = row.logsumexp(-1, keepdim=True)
        for count in (2**8, 2**12):
            if count >= row.shape[-1]:
                break
            best = row.topk(count).values
            if (best - log_total).exp().sum() > top_p:
                return (row >= best[:, -1:]).nonzero()[:, 1], log_total
    return torch.arange(row.shape[-1]), None


def process(
    logits: Tensor,
    *,
    blocked: Tensor | None = None,
    seen: Tensor | None = None,
    penalty: Tensor | None = None,
) -> Tensor:
    """The logits, in float32, after the rules that apply to greedy and beam search too.

    Tokens in `blocked`, bool, (V,) or (B, V), are never chosen; `penalty`, 0-dimensional or (B, 1),
    is the repetition penalty of the tokens in `seen`, (B, V).
    """
    scores = logits.float()
    if penalty is not None and seen is not None:
        scores = penalize_repetition(scores, seen, penalty)
    if blocked is not None:
        scores = scores.masked_fill(blocked, -torch.inf)
    return scores


def keep(scores: Tensor, knobs: Knobs, *, log_total: Tensor | None = None) -> Tensor:
    """Each rule in the order in which transformers applies them, after the temperature.

    `log_total`, (B, 1), is the logarithm of the sum of all exponentials, where `scores` are only
    some of them and top-p is the first rule.
    """
    if knobs.top_k is not None:
        scores = keep_top_k(scores, knobs.top_k)
    if knobs.top_p is not None:
        scores = keep_top_p(scores, knobs.top_p, log_total=log_total)
    if knobs.grover_top_p is not None:
        scores = keep_top_p_grover(scores, knobs.grover_top_p, log_total=log_total)
    if knobs.min_p is not None:
        scores = keep_min_p(scores, knobs.min_p)
    if knobs.typical_p is not None:
        scores = keep_typical(scores, knobs.typical_p)
    return scores


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """The k best, and what ties with the last of them. Source: transformers, TopKLogitsWarper."""
    best_first = scores.sort(dim=-1, descending=True).values
    last = (k.clamp(1, scores.shape[-1]) - 1).expand(scores.shape[0], 1)
    return scores.masked_fill(scores < best_first.gather(-1, last), -torch.inf)


def keep_top_p(scores: Tensor, p: Tensor, *, log_total: Tensor | None = None) -> Tensor:
    """The fewest of the best whose probabilities sum to p or more: the one that crosses p is kept.

    Of equal scores the lower ids stay; in transformers that is left to an unstable sort.
    Source: transformers, TopPLogitsWarper.
    """
    order, probabilities = _best_first(scores, log_total)
    better = probabilities.cumsum(-1) - probabilities  # the sum of all better ones
    dropped = (better >= p) & (p < 1)
    dropped[..., 0] = False
    return _drop(scores, order, dropped)


def keep_top_p_grover(scores: Tensor, p: Tensor, *, log_total: Tensor | None = None) -> Tensor:
    """Those of the best whose probabilities sum to less than p, and the best one in any case.

    The token that crosses p is dropped; of equal scores the lower ids come first.
    Source: imcaspar/gpt2-ml, train/modeling.py, top_p_sample.
    """
    order, probabilities = _best_first(scores, log_total)
    dropped = (probabilities.cumsum(-1) >= p) & (p < 1)
    dropped[..., 0] = False
    return _drop(scores, order, dropped)


def _best_first(scores: Tensor, log_total: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places by falling score, of equal scores the lower first, and their probabilities."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    if log_total is None:
        log_total = scores.logsumexp(-1, keepdim=True)
    return order, (ordered - log_total).double().exp()


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Those at least p times as probable as the best. Source: transformers, MinPLogitsWarper."""
    probabilities = scores.softmax(-1)
    best = probabilities.amax(-1, keepdim=True)
    dropped = (probabilities < p * best) & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(dropped, -torch.inf)


def keep_typical(scores: Tensor, p: Tensor) -> Tensor:
    """The tokens whose surprise is nearest to the expected one, until their probabilities reach p.

    Source: Meister et al. 2022; transformers, TypicalLogitsWarper.
    """
    log_p = scores.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    typical_first, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    reached = scores.gather(-1, order).softmax(-1).cumsum(-1) < p
    last = reached.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return _drop(scores, order, (typical_first > typical_first.gather(-1, last)) & (p < 1))


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make seen tokens less likely: divide a positive logit, multiply a negative one.

    Source: Keskar et al. 2019, CTRL; transformers, RepetitionPenaltyLogitsProcessor.
    """
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalized, scores)


def row_key(seed: int, row: int) -> int:
    """The key of a row's random stream; streams of different (seed, row) are unrelated."""
    mixed = _mix_int(seed % 2**64)
    mixed = _mix_int((mixed + (row + 1) * (_GAMMA % 2**64)) % 2**64)
    return mixed - 2**64 if mixed >= 2**63 else mixed


def exponential(keys: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
    """Independent draws of the exponential distribution, (B,) keys and steps -> (B, ids) float64.

    argmax(logits - log(draws)) follows softmax(logits): the Gumbel-max method. A token's draw
    depends on its id, not on which others there are.
    """
    bits = _mix(_mix(keys + steps * _GAMMA)[:, None] + (ids + 1) * _GAMMA)
    mantissa = (bits >> 11).bitwise_and_(2**53 - 1)  # (B, ids), uniform on 53 bits
    return mantissa.double().add_(0.5).mul_(2.0**-53).log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer; int64 products wrap, and a mask makes each shift a logical one."""
    z = (z >> 30).bitwise_and_(2**34 - 1).bitwise_xor_(z).mul_(_MULTIPLY_1)
    z = (z >> 27).bitwise_and_(2**37 - 1).bitwise_xor_(z).mul_(_MULTIPLY_2)
    return (z >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(z)


def _mix_int(z: int) -> int:
    """`_mix` on Python's integers, 0 <= z < 2**64."""
    z = (z ^ (z >> 30)) * (_MULTIPLY_1 % 2**64) % 2**64
    z = (z ^ (z >> 27)) * (_MULTIPLY_2 % 2**64) % 2**64
    return z ^ (z >> 31)


def _drop(scores: Tensor, order: Tensor, dropped: Tensor) -> Tensor:
    """Set to -inf what is marked in sorted order."""
    return scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
