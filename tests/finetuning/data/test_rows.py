"""Each token is learned once, documents stay apart, and the order can be resumed anywhere."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning.data.batches import BatchStream, evaluation_batches
from gpt2ml_torch.finetuning.data.cache import tokenize_files
from gpt2ml_torch.finetuning.data.corpus import Corpus
from gpt2ml_torch.finetuning.data.rows import RowDataset, Rows, collate
from gpt2ml_torch.finetuning.data.summary import summarize
from gpt2ml_torch.model import GPT2ML
from tests.helpers.finetuning_data import (
    NumberTokenizer,
    numbered_corpus,
    small_tokenizer,
    write_jsonl,
)
from tests.helpers.properties import given, settings, st

SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=12).filter(lambda sizes: max(sizes) > 1)


def learned_tokens(rows: RowDataset) -> Counter[int]:
    return Counter(
        int(label) for index in range(len(rows)) for label in rows[index].labels if label
    )


def targets_of(corpus: Corpus) -> Counter[int]:
    """All tokens except the first of each document and its prompt's."""
    prompts = corpus.documents["prompt"]
    return Counter(
        int(id_) for i in range(len(corpus)) for id_ in corpus[i][max(1, int(prompts[i])) :]
    )


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 24), pack=st.booleans(), data=st.data())
def test_every_token_is_a_target_exactly_once_and_documents_never_touch(
    sizes: list[int], length: int, pack: bool, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    prompts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered_corpus(Path(folder), sizes, prompts)
        rows = RowDataset(corpus, length=length, overlap=overlap, pack=pack)
        assert learned_tokens(rows) == targets_of(corpus)
        assert rows.num_targets == sum(targets_of(corpus).values())
        for row in (rows[index] for index in range(len(rows))):
            check_row(row, length)


def check_row(row: Rows, length: int) -> None:
    tokens, labels, positions, documents = (field.numpy() for field in row)
    assert all(field.shape == (length,) and field.dtype == torch.int64 for field in row)
    inside, learned = documents > 0, labels > 0
    assert np.array_equal(inside, tokens > 0)
    assert not np.any(learned & ~inside)
    # A document's tokens count on, with a gap behind it: any label from another one would show.
    assert np.array_equal(labels[learned], tokens[learned] + 1)
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    for start, stop in itertools.pairwise([*starts, length]):
        if documents[start]:
            count = np.arange(stop - start)
            assert np.array_equal(positions[start:stop], count)
            assert np.array_equal(tokens[start:stop], tokens[start] + count)
    assert documents[inside].tolist() == sorted(documents[inside])


@pytest.mark.parametrize("pack", [False, True])
def test_a_later_window_has_the_overlap_to_read_before_it_learns(
    tmp_path: Path, pack: bool
) -> None:
    rows = RowDataset(numbered_corpus(tmp_path, [100]), length=16, overlap=5, pack=pack)
    later = [rows[i] for i in range(len(rows)) if rows[i].token_ids[0] != 10]
    assert len(later) >= 5
    for row in later:
        assert int(torch.argmax((row.labels > 0).int())) >= 5
    if not pack:  # the last window reaches back, and so is full
        assert all(bool((row.token_ids > 0).all()) for row in later)


def test_a_row_of_the_original_is_an_article_cut_at_1024_and_padded(tmp_path: Path) -> None:
    rows = RowDataset(numbered_corpus(tmp_path, [1025, 300]))
    assert len(rows) == 2
    assert rows[0].token_ids.tolist() == list(range(10, 1034))
    assert rows[0].labels.tolist() == list(range(11, 1035))
    assert rows[1].labels.tolist() == [*range(1037, 1336), *[0] * 725]
    assert rows[1].positions.tolist() == list(range(1024))
    assert rows.cut_documents == 0


def test_short_documents_are_kept_unless_asked_and_counted_when_left_out(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [1, 2, 64, 65])
    assert (len(RowDataset(corpus)), RowDataset(corpus).too_short) == (3, 1)
    original = RowDataset(corpus, min_tokens=64)
    assert (len(original), original.too_short) == (1, 3)
    with pytest.raises(ValueError, match=r"none of 4 document\(s\) is long enough"):
        RowDataset(corpus, min_tokens=65)


def test_packing_wastes_little(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(2, 60, size=400).tolist()
    corpus = numbered_corpus(tmp_path, sizes)
    assert RowDataset(corpus, length=128, pack=True).fill > 0.98
    assert RowDataset(corpus, length=128).fill < 0.3


def test_bad_sizes_are_one_line_each(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [9])
    bad: list[tuple[dict[str, int], str]] = [
        ({"length": 0}, "row length is 0"),
        ({"length": 8, "overlap": 8}, "overlap is 8; expected 0 <= overlap < 8"),
        ({"overlap": -1}, "overlap is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            RowDataset(corpus, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents are numbered 0 to 1; the corpus has numbers 0"):
        RowDataset(corpus, documents=[0, 1])
    with pytest.raises(IndexError):
        RowDataset(corpus)[1]
    rows = RowDataset(corpus)
    for options, message in (
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchStream(rows, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowDataset:
    return RowDataset(numbered_corpus(tmp_path_factory.mktemp("rows"), [*range(2, 15)]), length=16)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def drawn(stream: BatchStream, batches: int, first: int = 0) -> list[list[int]]:
    """The first token of each row: which row it is."""
    numbers = range(first, first + batches)
    return [stream.batch(number).token_ids[:, 0].tolist() for number in numbers]


def test_iterating_as_in_version_0_1_0_gives_the_batches_and_warns(rows: RowDataset) -> None:
    stream = BatchStream(rows, batch_size=2, seed=3)
    with pytest.warns(DeprecationWarning, match=r"call batch\(0\)"):
        batches = iter(stream)
    for number in range(3):
        assert next(batches).token_ids.equal(stream.batch(number).token_ids)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_state_as_in_version_0_1_0_goes_on_in_another_stream(rows: RowDataset) -> None:
    stream = BatchStream(rows, batch_size=2, seed=3)
    batches = iter(stream)
    for _ in range(9):  # beyond the first epoch
        next(batches)
    other = BatchStream(rows, batch_size=2, seed=3)
    other.load_state_dict(stream.state_dict())
    assert next(iter(other)).token_ids.equal(stream.batch(9).token_ids)
    with pytest.raises(ValueError, match="seed is 4; the state to go on from has 3"):
        BatchStream(rows, batch_size=2, seed=4).load_state_dict(stream.state_dict())


def test_an_epoch_is_a_permutation_and_each_epoch_another(rows: RowDataset) -> None:
    order = flat(drawn(BatchStream(rows, batch_size=1), 39))
    epochs = [order[start : start + 13] for start in (0, 13, 26)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == 13
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == flat(drawn(BatchStream(rows, batch_size=3), 13))
    assert order[:13] != flat(drawn(BatchStream(rows, batch_size=1, seed=1), 13))
    straight = flat(drawn(BatchStream(rows, batch_size=1, shuffle=False), 13))
    assert straight == sorted(straight)


@settings(max_examples=50, deadline=None)
@given(before=st.integers(0, 30), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_resuming_anywhere_gives_the_same_stream(
    rows: RowDataset, before: int, batch: int, seed: int
) -> None:
    whole = drawn(BatchStream(rows, batch_size=batch, seed=seed), before + 6)
    resumed = BatchStream(rows, batch_size=batch, seed=seed)
    assert drawn(resumed, 6, first=before) == whole[before:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_shards_together_are_the_single_stream(rows: RowDataset, world_size: int) -> None:
    whole = drawn(BatchStream(rows, batch_size=12), 9)
    streams = [
        BatchStream(rows, batch_size=12 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shards = [drawn(stream, 9) for stream in streams]
    for step, expected in enumerate(whole):
        turns = zip(*(shard[step] for shard in shards), strict=True)
        assert [row for turn in turns for row in turn] == expected


def test_a_run_goes_on_with_another_number_of_processes(rows: RowDataset) -> None:
    whole = drawn(BatchStream(rows, batch_size=4), 10)
    halves = [
        drawn(BatchStream(rows, batch_size=2, rank=rank, world_size=2), 5, first=5)
        for rank in range(2)
    ]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [*map(sorted, whole[5:])]


def test_other_data_or_options_have_another_fingerprint(rows: RowDataset, tmp_path: Path) -> None:
    others = [
        RowDataset(rows.corpus, length=16),
        RowDataset(rows.corpus, length=15),
        RowDataset(rows.corpus, length=16, pack=True),
        RowDataset(rows.corpus, length=16, documents=[3, 4]),
        RowDataset(numbered_corpus(tmp_path, [9]), length=16),
    ]
    assert [other.fingerprint() == rows.fingerprint() for other in others] == [True] + [False] * 4


def test_rows_go_through_torchs_data_loader(rows: RowDataset) -> None:
    batch = next(iter(DataLoader(rows, batch_size=4)))
    assert batch.token_ids.shape == (4, 16)


def test_evaluation_reads_every_row_once_and_processes_keep_step(rows: RowDataset) -> None:
    counts = []
    learned: Counter[int] = Counter()
    for rank in range(3):
        batches = list(evaluation_batches(rows, batch_size=2, rank=rank, world_size=3))
        counts.append(len(batches))
        learned.update(int(label) for batch in batches for label in batch.labels.flatten() if label)
    assert counts == [3, 3, 3]
    assert learned == learned_tokens(rows)


def test_common_padding_can_be_cut_off(rows: RowDataset) -> None:
    batch = collate([rows[0], rows[3]], multiple_of=4)  # 1 and 4 tokens to read
    assert batch.token_ids.shape == (2, 4)
    assert collate([rows[0], rows[4]], multiple_of=4).token_ids.shape == (2, 8)
    assert collate([rows[0], rows[12]], multiple_of=10).token_ids.shape == (2, 16)
    assert collate([rows[0]]).token_ids.shape == (1, 16)


@torch.no_grad()
def test_the_model_sees_packed_documents_as_if_each_were_alone(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [7, 12, 5, 9])
    config = GPT2MLConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = GPT2ML(config).eval().double()
    rows = RowDataset(corpus, length=32, pack=True)
    assert len(rows) == 1
    row = collate([rows[0]])
    packed = model(row.token_ids, positions=row.positions, document_ids=row.document_ids)[0]
    for number in range(1, 5):
        inside = row.document_ids[0] == number
        alone = model(row.token_ids[:, inside])[0]
        torch.testing.assert_close(packed[inside], alone, rtol=0, atol=1e-12)


def test_the_summary_says_what_there_is_and_shows_an_example(tmp_path: Path) -> None:
    objects = [
        {"prompt": "春眠", "completion": "不觉晓"},
        {"text": "夜x"},
        {"text": "夜x"},
        {"text": "花"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", objects)
    tokenizer = small_tokenizer()
    corpus = tokenize_files(file, tokenizer, end_token="[SEP]", cache_dir=tmp_path / "cache")
    summary = summarize(RowDataset(corpus, length=4, min_tokens=2), tokenizer)
    assert (summary.files, summary.documents, summary.tokens) == (1, 4, 14)
    assert (summary.shortest, summary.median, summary.longest) == (2, 3, 6)
    assert (summary.too_short, summary.cut_documents, summary.duplicates) == (1, 1, 1)
    assert summary.characters == 8
    assert summary.unknown_share == pytest.approx(2 / 14)
    assert summary.unknown_characters == ("x",)
    assert (summary.example, summary.example_learned) == ("春眠不觉晓", "不觉晓")
    assert "14.3% of the tokens are [UNK] (among them x): perhaps the wrong" in summary.warnings[0]
    assert "1 of 4 documents are too short: left out" in str(summary)
    assert "warning: 1 documents repeat another one" in str(summary)
    assert "learned of it: 不觉晓" in str(summary)


def test_the_example_shows_the_special_tokens_and_good_data_gives_no_warning(
    tmp_path: Path,
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "春眠不觉晓"}])
    tokenizer = small_tokenizer()
    corpus = tokenize_files(file, tokenizer, end_token="[SEP]", cache_dir=tmp_path / "cache")
    summary = summarize(RowDataset(corpus), tokenizer)
    assert (summary.example, summary.example_learned) == ("春眠不觉晓[SEP]", "")
    assert summary.warnings == ()
    assert "warning" not in str(summary)


def test_the_largest_ids_survive(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"5 {(1 << 20) - 1}"}])
    corpus = tokenize_files(file, NumberTokenizer(), cache_dir=tmp_path / "cache")
    assert RowDataset(corpus, length=1)[0].labels.tolist() == [(1 << 20) - 1]
