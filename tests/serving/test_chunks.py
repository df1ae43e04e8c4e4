"""How much of a prompt is read between two steps follows from what both cost."""

from __future__ import annotations

import pytest

from gpt2ml_torch.serving.chunks import ALONE, GRAIN, SHARE, SMALLEST, CostCurve, Pace


def test_a_cost_is_never_guessed_below_a_floor_with_a_slope() -> None:
    curve = CostCurve()
    assert curve.seconds(1) is None

    def cost(size: int) -> float:
        return max(12.0, 3.0 * size)

    for size in (2, 16, 200):
        curve.note(size, cost(size))
    for size in range(1, 256):
        guess = curve.seconds(size)
        assert guess is not None
        assert guess >= cost(size) - 1e-9


def test_one_slow_call_does_not_stay_the_cost_of_its_size() -> None:
    curve = CostCurve()
    curve.note(8, 500.0)  # a first call, while memory is still being taken
    for _ in range(5):
        curve.note(4, 40.0)
    assert curve.seconds(8) == 80.0
    assert curve.seconds(6) == 80.0
    assert curve.seconds(9) == 120.0


@pytest.mark.parametrize("slope", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("running", [1, 7, 30])
def test_a_chunk_and_what_was_read_before_it_take_no_more_than_their_share(
    slope: float, running: int
) -> None:
    pace = Pace(1024)

    def cost(size: int) -> float:
        return max(4.0, slope * size)

    pace.note_read(200, cost(200))
    for _ in range(50):  # settles
        pace.note_step(running, cost(running))
        first = pace.tokens(running=running, spent=0.0)
        pace.note_read(first, cost(first))
    assert first == SMALLEST or cost(first) <= SHARE * cost(running)
    assert cost(first + GRAIN) > 0.9 * SHARE * cost(running)
    more = pace.tokens(running=running, spent=cost(first))
    assert not more or cost(first) + cost(more) <= SHARE * cost(running)


def test_alone_a_prompt_is_read_in_large_parts() -> None:
    assert Pace(1024).tokens(running=0, spent=0.0) == ALONE
    assert Pace(64).tokens(running=0, spent=0.0) == 64


def test_a_step_that_was_held_up_makes_the_next_pause_hardly_longer() -> None:
    pace = Pace(1024)
    for size in (8, 16, 32, 64):
        pace.note_read(size, 1.0 * size)
    for _ in range(10):
        pace.note_step(7, 30.0)
    before = pace.tokens(running=7, spent=0.0)
    pace.note_step(7, 300.0)
    assert pace.tokens(running=7, spent=0.0) <= before + SMALLEST
