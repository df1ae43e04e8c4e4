"""The rules that shape the distribution, against transformers' own, and the random streams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import sampling
from gpt2ml_torch.generation.constraints import RepeatedNGrams
from gpt2ml_torch.sampling import Knobs

hf = pytest.importorskip(
    "transformers.generation.logits_process", reason="transformers is not installed"
)

V = 50
NO_IDS: Any = None  # what these rules of transformers do not look at


def scores(*, ties: bool, seed: int = 0, rows: int = 200) -> Tensor:
    """Logits of many shapes; with ties, only a few different values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, V, generator=generator) * torch.linspace(0.1, 6, rows)[:, None]
    return values.round() if ties else values


def kept(values: Tensor) -> Tensor:
    return values > -torch.inf


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def clear_of(p: float, x: Tensor) -> Tensor:
    """The rows in which no sum of the best probabilities equals p up to rounding."""
    sums = x.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    rows = x[((sums - p).abs() > 1e-6).all(-1)]
    assert len(rows) > len(x) / 2
    return rows


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 49, 50, 1000])
def test_top_k_keeps_what_transformers_keeps(k: int, ties: bool) -> None:
    x = scores(ties=ties)
    expected = hf.TopKLogitsWarper(k)(NO_IDS, x)
    assert torch.equal(sampling.keep_top_k(x, scalar(k, torch.int64)), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.95, 0.999])
def test_top_p_keeps_what_transformers_keeps(p: float) -> None:
    x = scores(ties=False)
    expected = hf.TopPLogitsWarper(p)(NO_IDS, x)
    assert torch.equal(sampling.keep_top_p(x, scalar(p)), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.95, 0.999])
def test_top_p_keeps_as_many_of_equal_tokens_as_transformers_and_the_lower_ids(p: float) -> None:
    x = clear_of(p, scores(ties=True))
    ours, theirs = sampling.keep_top_p(x, scalar(p)), hf.TopPLogitsWarper(p)(NO_IDS, x)
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    worst = ours.masked_fill(~kept(ours), torch.inf).amin(-1, keepdim=True)
    for row in range(len(x)):
        tied = (x[row] == worst[row]).nonzero()[:, 0]
        stays = kept(ours)[row, tied]
        assert bool(stays[: int(stays.sum())].all())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 1.0])
def test_min_p_keeps_what_transformers_keeps(p: float, ties: bool) -> None:
    x = scores(ties=ties)
    ours, theirs = sampling.keep_min_p(x, scalar(p)), hf.MinPLogitsWarper(p)(NO_IDS, x)
    # At p = 1 theirs keeps one of several best tokens, whichever topk names first.
    assert torch.equal(ours, theirs) or (p == 1 and bool((kept(ours) >= kept(theirs)).all()))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.9, 0.99])
def test_typical_sampling_keeps_what_transformers_keeps(p: float, ties: bool) -> None:
    x = scores(ties=ties)
    assert torch.equal(sampling.keep_typical(x, scalar(p)), hf.TypicalLogitsWarper(p)(NO_IDS, x))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_grovers_top_p_drops_the_token_that_crosses_and_prefers_lower_ids(p: float) -> None:
    x = clear_of(p, scores(ties=True))
    probabilities = x.double().softmax(-1)
    kept_rows = kept(sampling.keep_top_p_grover(x, scalar(p)))
    for row, kept_row in zip(probabilities, kept_rows, strict=True):
        order = sorted(range(V), key=lambda id_: (-row[id_].item(), id_))
        total, expected = 0.0, {order[0]}
        for id_ in order:
            total += row[id_].item()
            if total >= p:
                break
            expected.add(id_)
        assert set(kept_row.nonzero()[:, 0].tolist()) == expected


def test_grovers_top_p_keeps_fewer_than_transformers() -> None:
    x = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert kept(sampling.keep_top_p_grover(x, scalar(0.7))).tolist() == [[True, False, False]]
    assert kept(sampling.keep_top_p(x, scalar(0.7))).tolist() == [[True, True, False]]


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    x = scores(ties=False)
    history = torch.randint(V, (len(x), 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(x.shape, dtype=torch.bool).scatter(1, history, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(history, x.clone())
    assert torch.equal(sampling.penalize_repetition(x, seen, scalar(penalty)), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 40])
def test_repeated_ngrams_are_those_of_transformers(size: int) -> None:
    """At every length of a growing text."""
    history = torch.randint(4, (20, 45), generator=torch.Generator().manual_seed(2))
    for row in history.tolist():
        ids: list[int] = []
        ngrams = RepeatedNGrams(ids, size)
        for length, id_ in enumerate(row, start=1):
            ids.append(id_)
            x = hf.NoRepeatNGramLogitsProcessor(size)(torch.tensor([ids]), torch.zeros(1, V))
            expected = (x[0] == -torch.inf).nonzero()[:, 0].tolist() if length >= size - 1 else []
            assert sorted(ngrams.banned()) == expected


def test_a_copy_of_repeated_ngrams_goes_its_own_way() -> None:
    ids = [5, 6, 7, 5]
    ngrams = RepeatedNGrams(ids, 2)
    assert ngrams.banned() == [6]
    other = ngrams.follow([5, 6, 7, 5, 8, 5])
    assert sorted(other.banned()) == [6, 8]
    assert ngrams.banned() == [6]


def draw(x: Tensor, knobs: Knobs, count: int, seed: int = 0) -> Tensor:
    keys = torch.tensor([sampling.row_key(seed, 0)]).expand(count)
    return sampling.choose(x.expand(count, -1), knobs, keys=keys, steps=torch.arange(count))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 1.5]])
    knobs = Knobs(sample=torch.tensor(True), temperature=scalar(temperature))
    counts = draw(x, knobs, 40_000).bincount(minlength=6).double()
    # 5 degrees of freedom: 25.7 is exceeded once in 10,000 seeds.
    assert chi_square(counts, (x[0].double() / temperature).softmax(-1)) < 25.7


def test_draws_after_top_k_follow_the_renormalised_distribution() -> None:
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 1.5]])
    knobs = Knobs(sample=torch.tensor(True), top_k=torch.tensor(3))
    counts = draw(x, knobs, 40_000).bincount(minlength=6).double()
    best = [0, 1, 5]
    assert counts.sum() == counts[best].sum()
    assert chi_square(counts[best], x[0, best].double().softmax(-1)) < 18.4  # 2 degrees


def test_random_streams_are_uniform_and_unrelated() -> None:
    keys = torch.tensor([sampling.row_key(seed, row) for seed in range(20) for row in range(20)])
    draws = sampling.exponential(keys, torch.zeros_like(keys), torch.arange(64))
    uniform = (-draws).exp()
    assert abs(uniform.mean() - 0.5) < 4 * math.sqrt(1 / 12 / uniform.numel())
    correlation = torch.corrcoef(uniform) - torch.eye(len(keys))
    assert correlation.abs().max() < 6 / math.sqrt(64)
    assert correlation.std() < 1.1 / math.sqrt(64)
    next_step = (-sampling.exponential(keys, torch.ones_like(keys), torch.arange(64))).exp()
    both = torch.stack([uniform.flatten(), next_step.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / math.sqrt(uniform.numel())


def test_the_noise_is_splitmix64() -> None:
    """Bit for bit what plain Python integers give: nothing depends on the device's arithmetic."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    gamma, key = 0x9E3779B97F4A7C15, sampling.row_key(5, 3)
    state = mix((key + 7 * gamma) % 2**64)
    expected = [
        -math.log(((mix((state + id_ * gamma) % 2**64) >> 11) + 0.5) * 2.0**-53)
        for id_ in range(1, 9)
    ]
    found = sampling.exponential(torch.tensor([key]), torch.tensor([7]), torch.arange(8))[0]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_greedy_takes_the_lowest_of_equal_ids_and_no_blocked_one() -> None:
    x = torch.tensor([[3.0, 1.0, 3.0, 3.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    blocked = torch.tensor([True, False, False, False])
    assert sampling.choose(x, Knobs(), keys=zero, steps=zero).item() == 0
    scores = sampling.process(x, blocked=blocked)
    assert sampling.choose(scores, Knobs(), keys=zero, steps=zero).item() == 2


@pytest.mark.parametrize("rules", [{}, {"top_k": 4}, {"top_p": 0.6}, {"typical_p": 0.5}])
def test_each_row_is_drawn_by_its_own_column_of_values(rules: dict[str, float]) -> None:
    """As CUDA draws them: all rules for all rows, neutral in the rows that have none."""
    neutral = {"temperature": 1.0, "top_k": 2**31, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    values = [neutral, {**neutral, "temperature": 0.7, **rules}, neutral]
    columns: dict[str, Tensor] = {
        name: torch.tensor([[row[name]] for row in values]) for name in neutral
    }
    columns["sample"] = torch.tensor([[True], [True], [False]])
    x = scores(ties=True, rows=40)
    keys, steps = torch.arange(3) * 7919, torch.arange(3)
    for first in range(0, 36, 3):
        rows = x[first : first + 3]
        found = sampling.choose(rows, Knobs(**columns), keys=keys, steps=steps)
        for row in range(3):
            alone = Knobs(**{name: column[row, 0] for name, column in columns.items()})
            one = slice(row, row + 1)
            expected = sampling.choose(rows[one], alone, keys=keys[one], steps=steps[one])
            assert found[row] == expected


LARGE = 5000  # a vocabulary in which candidates are looked for first
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": scalar(0.6)},
    {"top_k": torch.tensor(5)},
    {"top_k": torch.tensor(10_000)},
    {"top_p": scalar(0.95)},
    {"top_p": scalar(0.3), "temperature": scalar(1.7)},
    {"grover_top_p": scalar(0.9)},
    {"top_k": torch.tensor(400), "top_p": scalar(0.8), "min_p": scalar(0.01)},
    {"min_p": scalar(0.05)},
    {"top_p": scalar(0.9), "typical_p": scalar(0.7)},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "+".join(rules) or "none")
@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0])
@pytest.mark.parametrize("ties", [False, True])
def test_looking_at_candidates_alone_changes_no_draw(
    rules: dict[str, Any], spread: float, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(20, LARGE, generator=torch.Generator().manual_seed(5)) * spread
    x = x.round() if ties else x
    knobs = Knobs(sample=torch.tensor(True), **rules)
    draws = {"keys": torch.arange(20) * 7919, "steps": torch.arange(20)}
    found = sampling.choose(x, knobs, **draws)
    monkeypatch.setattr(sampling, "_SMALL", LARGE)
    assert torch.equal(found, sampling.choose(x, knobs, **draws))


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "+".join(rules) or "none")
def test_every_token_that_is_kept_is_a_candidate(rules: dict[str, Any]) -> None:
    for seed, spread in ((0, 0.1), (1, 4.0), (2, 15.0)):
        x = torch.randn(1, LARGE, generator=torch.Generator().manual_seed(seed)) * spread
        knobs = Knobs(**rules)
        ids, _ = sampling.candidates(x, knobs)
        assert set(kept(sampling.keep(x, knobs))[0].nonzero()[:, 0].tolist()) <= set(ids.tolist())


def test_neutral_values_change_nothing() -> None:
    x = scores(ties=True)
    knobs = Knobs(
        sample=torch.tensor(True),
        temperature=scalar(1.0),
        top_k=torch.tensor(2**31),
        top_p=scalar(1.0),
        grover_top_p=scalar(1.0),
        min_p=scalar(0.0),
        typical_p=scalar(1.0),
    )
    assert torch.equal(sampling.keep(x, knobs), x)
