"""Stop strings are left out of a response, however the pieces fall."""

from __future__ import annotations

from gpt2ml_torch.serving.responses import StopFilter, token_offsets
from tests.helpers.properties import given, st


def run(stops: list[str], pieces: list[str], reason: str) -> list[str]:
    filtered = StopFilter(stops)
    return [
        filtered.put(piece, finish_reason=reason if index == len(pieces) - 1 else None)
        for index, piece in enumerate(pieces)
    ]


def test_a_stop_string_in_pieces_is_withheld_and_left_out() -> None:
    assert run(["。完"], ["好", "。", "完"], "stop") == ["好", "", ""]


def test_what_only_began_like_a_stop_string_is_given_after_all() -> None:
    assert run(["。完"], ["好", "。", "了"], "length") == ["好", "", "。了"]


def test_a_text_that_ended_by_length_keeps_what_looks_like_a_stop_string() -> None:
    assert "".join(run(["。"], ["好", "。"], "length")) == "好。"


def test_a_stop_string_in_upper_case_is_found_as_it_is_written() -> None:
    assert "".join(run(["END"], ["the e", "nd"], "stop")) == "the "


_text = st.text(alphabet="ab。", max_size=12)


@given(
    st.lists(_text, min_size=1, max_size=6),
    st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_join_to_the_text_without_its_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    assert "".join(run(stops, pieces, "length")) == text
    ended = max((len(stop) for stop in stops if text.endswith(stop)), default=0)
    assert "".join(run(stops, pieces, "stop")) == text[: len(text) - ended]


def test_tokens_are_found_in_their_text_whatever_stands_between_them() -> None:
    text = "Café  No\u0301n 龘春"
    names = ["cafe", "no", "n", "[UNK]", "春"]
    assert token_offsets(names, text) == [0, 6, 9, 11, 12]
    assert token_offsets(["[UNK]", "春"], "unknowable春") == [0, 10]
    assert token_offsets(["a", "b"], "") == [0, 0]
