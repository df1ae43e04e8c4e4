"""Continuous batching changes no text: what comes when, and beside what, makes no difference."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2ml_torch import Generator
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.serving import QueueFull, Scheduler
from gpt2ml_torch.serving.chunks import ALONE
from gpt2ml_torch.serving.prefixes import PrefixCopy

PROMPTS = (
    "春眠不觉晓",
    "床前明月光，疑是地上霜。",
    "白日依山尽",
    "千山鸟飞绝，万径人踪灭。孤舟",
    "红",
)

pytestmark = pytest.mark.usefixtures("one_thread")


def options_of(draw: random.Random) -> dict[str, Any]:
    """Settings of one request, of every kind."""
    options: dict[str, Any] = {
        "max_new_tokens": draw.randint(1, 24),
        "seed": draw.randrange(1000),
        "top_k": draw.choice((0, 1, 5, 40)),
        "top_p": draw.choice((1.0, 0.9, 0.5)),
        "temperature": draw.choice((0.0, 0.7, 1.0, 1.3)),
    }
    extra: list[dict[str, Any]] = [
        {},
        {"stop": ["。"], "min_new_tokens": 1},
        {"bad_words": ["，"]},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"min_p": 0.05},
        {"typical_p": 0.9},
        {"top_p_rule": "grover"},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"logit_bias": {200: 5.0, 201: -100.0}},
    ]
    return options | draw.choice(extra)


def test_a_hundred_requests_at_random_times_write_what_each_writes_alone(
    generator: Generator,
) -> None:
    draw = random.Random(5)
    requests = [(draw.choice(PROMPTS), options_of(draw)) for _ in range(100)]
    alone = [generator.generate(p, return_full_text=False, **options)[0] for p, options in requests]
    with Scheduler(generator, max_rows=5, max_queue=100) as scheduler:
        handles = []
        for prompt, options in requests:
            handles.append(scheduler.submit(prompt, **options))
            time.sleep(draw.choice((0, 0, 0.002, 0.01)))
        assert [handle.result(60) for handle in handles] == alone
        end = time.monotonic() + 10
        while scheduler.running or scheduler.queued:  # the last rows are freed a moment later
            assert time.monotonic() < end


@pytest.mark.parametrize("precision", ["int4", "float32", None])
def test_texts_are_the_same_in_every_precision(shipped_model: Path, precision: str | None) -> None:
    dtype = torch.float64 if precision is None else torch.float32  # plain, and exact enough
    generator = Generator.from_pretrained(
        shipped_model, quantize=precision, dtype=dtype, compile=False
    )
    draw = random.Random(6)
    requests = [(draw.choice(PROMPTS), options_of(draw)) for _ in range(12)]
    alone = [generator.generate(p, return_full_text=False, **options)[0] for p, options in requests]
    with Scheduler(generator, max_rows=3) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt, options in requests]
        assert [handle.result(60) for handle in handles] == alone


def test_a_single_text_is_speculated_and_stays_the_same(shipped_model: Path) -> None:
    plain = Generator.from_pretrained(shipped_model)
    helped = Generator.from_pretrained(shipped_model, assistant="int4")
    assert helped.assistant is not None
    draw = random.Random(7)
    requests = [(draw.choice(PROMPTS), options_of(draw)) for _ in range(10)]
    alone = [plain.generate(p, return_full_text=False, **options)[0] for p, options in requests]
    with Scheduler(helped, max_rows=3) as scheduler:
        assert [scheduler.submit(p, **options).result(60) for p, options in requests] == alone
        assert scheduler._running.draft is not None
        steps = scheduler._running.draft.steps
        handles = [scheduler.submit(prompt, **options) for prompt, options in requests]
        assert [handle.result(60) for handle in handles] == alone
    assert steps > 0


def test_samples_of_one_prompt_are_those_of_generate(generator: Generator) -> None:
    options: dict[str, Any] = {"seed": 3, "max_new_tokens": 12}
    texts = generator.generate(
        PROMPTS[0], num_return_sequences=3, return_full_text=False, **options
    )
    with Scheduler(generator) as scheduler:
        handles = [scheduler.submit(PROMPTS[0], sample=i, **options) for i in range(3)]
        assert [handle.result(60) for handle in handles] == texts


def test_a_long_prompt_is_read_in_chunks_beside_running_texts(generator: Generator) -> None:
    long = "春江潮水连海平，海上明月共潮生。" * 40
    alone = generator.generate(
        [PROMPTS[0], long], return_full_text=False, seed=1, max_new_tokens=40
    )
    with Scheduler(generator, max_rows=2) as scheduler:
        first = scheduler.submit(PROMPTS[0], seed=1, max_new_tokens=40)
        second = scheduler.submit(long, seed=1, sample=1, max_new_tokens=40)
        assert [first.result(60), second.result(60)] == alone


def test_a_text_that_outgrows_the_window_is_read_again_beside_the_others(
    generator: Generator,
) -> None:
    limit = generator.engine.limit
    long = "春" * (limit - 6)
    options: dict[str, Any] = {"seed": 2, "max_new_tokens": 20, "window_keep": 64}
    alone = [
        generator.generate(prompt, return_full_text=False, **options)[0] for prompt in (long, "红")
    ]
    with Scheduler(generator, max_rows=2) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt in (long, "红")]
        assert [handle.result(60) for handle in handles] == alone


def test_a_prompt_may_be_token_ids(generator: Generator) -> None:
    ids = generator.tokenizer.encode(PROMPTS[1])
    with Scheduler(generator) as scheduler:
        by_text = scheduler.submit(PROMPTS[1], seed=1, max_new_tokens=8)
        by_ids = scheduler.submit(ids, seed=1, max_new_tokens=8)
        assert by_ids.result(60) == by_text.result(60)


def test_a_shared_beginning_is_read_once_and_changes_nothing(generator: Generator) -> None:
    beginning = "春江潮水连海平，海上明月共潮生。"
    prompts = [beginning + "滟滟", beginning + "江流", beginning + "滟滟随波"]
    alone = [
        generator.generate(p, return_full_text=False, seed=0, max_new_tokens=8)[0] for p in prompts
    ]
    with Scheduler(generator, max_rows=1) as scheduler:
        handles = [scheduler.submit(prompt, seed=0, max_new_tokens=8) for prompt in prompts]
        assert [handle.result(60) for handle in handles] == alone
        shared = len(generator.tokenizer.encode(beginning))
        assert [handle.cached_tokens for handle in handles] == [0, shared, shared + 2]
        assert scheduler.prefix_tokens > 0


def test_a_prompt_that_is_known_to_its_end_is_not_read_at_all(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 3, "max_new_tokens": 6}
    texts = generator.generate(
        PROMPTS[1], num_return_sequences=4, return_full_text=False, **options
    )
    with Scheduler(generator, max_rows=2) as scheduler:
        assert scheduler.submit(PROMPTS[1], **options).result(60) == texts[0]
        monkeypatch.setattr(scheduler._rows, "read", None)
        handles = [scheduler.submit(PROMPTS[1], sample=row, **options) for row in (1, 2, 3)]
        assert [handle.result(60) for handle in handles] == texts[1:]
        assert {handle.cached_tokens for handle in handles} == {len(handles[0].prompt_ids)}


def test_a_prompt_is_copied_for_later_part_by_part(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    follow = PrefixCopy.follow

    def noted(copy: PrefixCopy, cache: KVCache, row: int, read: int) -> None:
        copied.append(read)
        follow(copy, cache, row, read)

    monkeypatch.setattr(PrefixCopy, "follow", noted)
    long = "春江潮水连海平，海上明月共潮生。" * 40
    with Scheduler(generator, max_rows=2) as scheduler:
        beside = scheduler.submit(PROMPTS[0], max_new_tokens=1000)
        next(iter(beside))
        first = scheduler.submit(long, seed=1, max_new_tokens=4)
        text = first.result(60)
        again = scheduler.submit(long, seed=1, max_new_tokens=4)
        assert again.result(60) == text
        assert again.cached_tokens == len(again.prompt_ids)
        beside.cancel()
    steps = [later - before for before, later in itertools.pairwise([0, *copied[1:]])]
    assert sum(steps) == len(first.prompt_ids)
    assert max(steps) <= ALONE


def test_the_prefix_cache_is_bounded(generator: Generator) -> None:
    with Scheduler(generator, prefix_tokens=16) as scheduler:
        for prompt in PROMPTS * 2:
            scheduler.submit(prompt, max_new_tokens=1).result(60)
            assert scheduler.prefix_tokens <= 16


def test_log_probabilities_are_the_generators(generator: Generator) -> None:
    (expected,) = generator.complete(PROMPTS[0], logprobs=True, seed=4, max_new_tokens=10)
    with Scheduler(generator) as scheduler:
        beside = scheduler.submit(PROMPTS[1], seed=9, max_new_tokens=20)
        handle = scheduler.submit(PROMPTS[0], seed=4, max_new_tokens=10, top_logprobs=2)
        tokens = [token for piece in handle for token in piece.tokens]
        beside.result(60)
    assert tuple(token.id for token in tokens) == expected.token_ids
    assert [token.logprob for token in tokens] == pytest.approx(list(expected.logprobs), abs=1e-6)
    for token in tokens:
        assert len(token.top) == 2
        assert token.top[0][1] >= token.top[1][1]


def test_a_cancelled_text_frees_its_row_within_a_step(generator: Generator) -> None:
    with Scheduler(generator, max_rows=1) as scheduler:
        endless = scheduler.submit(PROMPTS[0], max_new_tokens=1000)
        next(iter(endless))
        waiting = scheduler.submit(PROMPTS[1], seed=1, max_new_tokens=4)
        endless.cancel()
        assert len(waiting.result(60)) > 0
        *_, last = endless
        assert last.finish_reason == "cancelled"


def test_a_row_freed_by_a_cancellation_is_taken_over_whole(generator: Generator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 3, "top_k": 0}
    alone = [generator.generate(p, return_full_text=False, **options)[0] for p in PROMPTS]
    with Scheduler(generator, max_rows=8) as scheduler:
        for _ in range(4):
            endless = [scheduler.submit(PROMPTS[0], max_new_tokens=1000) for _ in range(3)]
            handles = [scheduler.submit(prompt, **options) for prompt in PROMPTS]
            next(iter(handles[-1]))
            for handle in endless:
                handle.cancel()
            beginning = next(iter(handles[0])).text
            results = [handle.result(60) for handle in handles]
            assert [beginning + results[0], *results[1:-1]] == alone[:-1]


def test_texts_that_come_together_begin_together(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(generator, max_rows=4)
    sizes: list[int] = []
    decode = scheduler._rows.decode

    def counted(ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        sizes.append(len(ids))
        return decode(ids, positions)

    monkeypatch.setattr(scheduler._rows, "decode", counted)
    handles = [scheduler.submit(prompt, max_new_tokens=8, seed=1) for prompt in PROMPTS[:4]]
    with scheduler:
        for handle in handles:
            handle.result(60)
    assert sizes == [4] * 7


def test_a_long_prompt_does_not_hold_back_those_that_came_with_it(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2ml_torch.serving.scheduler.HOLD_SECONDS", 0.0)
    scheduler = Scheduler(generator, max_rows=2)
    short = scheduler.submit(PROMPTS[0], max_new_tokens=2, seed=1)
    long = scheduler.submit("春江潮水连海平，海上明月共潮生。" * 60, max_new_tokens=1, seed=1)
    with scheduler:
        short.result(60)
        assert not long._pieces
        long.result(60)


def test_what_waits_can_be_cancelled(generator: Generator) -> None:
    with Scheduler(generator, max_rows=1) as scheduler:
        endless = scheduler.submit(PROMPTS[0], max_new_tokens=1000)
        waiting = scheduler.submit(PROMPTS[1], max_new_tokens=1000)
        waiting.cancel()
        assert [piece.finish_reason for piece in waiting] == ["cancelled"]
        endless.cancel()


def test_a_full_queue_refuses(generator: Generator) -> None:
    with Scheduler(generator, max_rows=1, max_queue=1) as scheduler:
        handles = [scheduler.submit(PROMPTS[0], max_new_tokens=1000)]
        next(iter(handles[0]))
        handles.append(scheduler.submit(PROMPTS[0], max_new_tokens=1000))
        with pytest.raises(QueueFull, match="try again"):
            scheduler.submit(PROMPTS[0])
        for handle in handles:
            handle.cancel()


def test_closing_lets_running_texts_end_and_takes_no_more(generator: Generator) -> None:
    scheduler = Scheduler(generator).start()
    handle = scheduler.submit(PROMPTS[0], seed=1, max_new_tokens=30)
    scheduler.close(drain_seconds=60)
    assert len(handle.result(1)) > 0
    with pytest.raises(QueueFull):
        scheduler.submit(PROMPTS[0])


def test_closing_at_once_cancels(generator: Generator) -> None:
    scheduler = Scheduler(generator).start()
    handle = scheduler.submit(PROMPTS[0], max_new_tokens=1000)
    scheduler.close()
    *_, last = handle
    assert last.finish_reason == "cancelled"


def test_many_threads_may_submit(generator: Generator) -> None:
    expected = generator.generate(PROMPTS[2], return_full_text=False, seed=8, max_new_tokens=10)[0]
    results: list[str] = []
    with Scheduler(generator, max_rows=3) as scheduler:

        def ask() -> None:
            results.append(scheduler.submit(PROMPTS[2], seed=8, max_new_tokens=10).result(60))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 8


def test_asyncio_iterates_several_at_once(generator: Generator) -> None:
    expected = generator.generate(PROMPTS[2], return_full_text=False, seed=8, max_new_tokens=10)[0]

    async def read(scheduler: Scheduler) -> str:
        handle = scheduler.submit(PROMPTS[2], seed=8, max_new_tokens=10)
        return "".join([piece.text async for piece in handle])

    async def main() -> list[str]:
        with Scheduler(generator, max_rows=3) as scheduler:
            return await asyncio.gather(*(read(scheduler) for _ in range(4)))

    assert asyncio.run(main()) == [expected] * 4


def test_a_forced_token_that_ends_a_bad_word_is_taken_at_once(generator: Generator) -> None:
    options: dict[str, Any] = {"forced_start": "春", "bad_words": ["春"], "max_new_tokens": 3}
    alone = generator.generate(PROMPTS[1], return_full_text=False, seed=1, **options)
    with Scheduler(generator) as scheduler:
        assert [scheduler.submit(PROMPTS[1], seed=1, **options).result(20)] == alone


def test_bad_settings_are_refused_before_anything_runs(generator: Generator) -> None:
    with Scheduler(generator) as scheduler:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"num_beams": 2}, "num_beams"),
            ({"top_p": 2.0}, "top_p"),
            ({"suppress_tokens": [10**6]}, "token id"),
        ]
        for options, message in wrong:
            with pytest.raises(ValueError, match=message):
                scheduler.submit(PROMPTS[0], **options)
        with pytest.raises(ValueError, match="no token"):
            scheduler.submit("  ")
        for ids, message in (([], "no token"), ([5, 10**6], "1000000"), ([-1], "-1")):
            with pytest.raises(ValueError, match=message):
                scheduler.submit(ids)


def test_an_error_in_a_step_reaches_those_who_wait_and_the_others_go_on(
    shipped_model: Path,
) -> None:
    generator = Generator.from_pretrained(shipped_model)
    norm = generator.model.embedding_norm
    before = norm.bias.detach().clone()
    with Scheduler(generator) as scheduler:
        with torch.no_grad():
            norm.bias[0] = torch.nan
        with pytest.raises(ValueError, match="embedding_norm"):
            scheduler.submit(PROMPTS[0], max_new_tokens=8).result(60)
        with torch.no_grad():
            norm.bias.copy_(before)
        assert scheduler.submit(PROMPTS[0], seed=1, max_new_tokens=8).result(60)


def test_memory_bounds_the_rows(generator: Generator) -> None:
    from gpt2ml_torch.serving.rows import row_size

    row = row_size(generator.engine)
    assert Scheduler(generator, max_rows=8, max_memory=3 * row)._rows.count == 3
    with pytest.raises(ValueError, match="max_memory"):
        Scheduler(generator, max_memory=row - 1)
