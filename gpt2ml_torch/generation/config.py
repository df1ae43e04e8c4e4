"""GenerationConfig: how to continue a text, validated once; a model's file holds its defaults.

Names follow transformers' `generate`, which users know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gpt2ml_torch.options import OptionError, check_names, check_options, option

MAX_TOKENS = 2**20  # of a text; the model sees far fewer at once
MAX_TEXTS = 2**16  # of a prompt
MAX_NGRAM = 1024
MAX_ID = 2**31  # what no vocabulary reaches; the model's own size is checked later
_COLDEST = 1e-30  # temperature
_STRINGS = ("stop", "bad_words")
_IDS = ("eos_token_id", "suppress_tokens", "allow_tokens")

_LENGTH, _CHOICE, _CONTENT, _WORK = "length and end", "choice", "content", "working"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a text; each field says what it does.

    Raises `ValueError`, naming the field, for values that make no sense. Some fields take more
    than their type says: `stop` and `bad_words` one string, ids one number, `forced_ids` and
    `logit_bias` a mapping.
    """

    max_new_tokens: int = option(
        256, low=1, high=MAX_TOKENS, group=_LENGTH, help="tokens to write at most"
    )
    min_new_tokens: int = option(
        0, low=0, high=MAX_TOKENS, group=_LENGTH, help="an end before this many does not count"
    )
    stop: tuple[str, ...] = option(
        (), group=_LENGTH, help="end the text after this string, which is kept"
    )
    eos_token_id: tuple[int, ...] = option(
        (),
        low=0,
        high=MAX_ID,
        flags="--end-id",
        metavar="ID",
        group=_LENGTH,
        help="end the text at this token id, which is not kept",
    )
    do_sample: bool = option(
        True,
        flags="--greedy",
        inverted=True,
        group=_CHOICE,
        help="take the most probable token each time",
    )
    temperature: float = option(
        1.0, low=0, high=1e6, group=_CHOICE, help="above 1 flatter; 0 is the most probable token"
    )
    top_k: int = option(
        0, low=0, high=MAX_ID, metavar="K", group=_CHOICE, help="draw from the K best; 0: from all"
    )
    top_p: float = option(
        1.0, above=0, high=1, metavar="P", group=_CHOICE, help="draw from the best that sum to P"
    )
    top_p_rule: Literal["huggingface", "grover"] = option(
        "huggingface",
        group=_CHOICE,
        help="grover is the original's: it drops the token that crosses P",
    )
    min_p: float = option(
        0.0,
        low=0,
        high=1,
        metavar="P",
        group=_CHOICE,
        help="draw from those at least P times as probable as the best",
    )
    typical_p: float = option(
        1.0, above=0, high=1, metavar="P", group=_CHOICE, help="locally typical sampling"
    )
    seed: int | None = option(
        None,
        low=-(2**63),
        high=2**64 - 1,
        default_text="a new one each time",
        group=_CHOICE,
        help="the same seed writes the same text",
    )
    num_beams: int = option(
        1, low=1, high=1024, metavar="N", group=_CHOICE, help="above 1: beam search, no sampling"
    )
    length_penalty: float = option(
        1.0,
        low=-100,
        high=100,
        group=_CHOICE,
        help="a beam's summed log-probability is divided by its length to this power",
    )
    repetition_penalty: float = option(
        1.0,
        above=0,
        high=1e6,
        group=_CONTENT,
        help="above 1: repeat less, the prompt included; as in transformers",
    )
    presence_penalty: float = option(
        0.0,
        low=-2,
        high=2,
        group=_CONTENT,
        help="subtracted from the logits of tokens written before",
    )
    frequency_penalty: float = option(
        0.0,
        low=-2,
        high=2,
        group=_CONTENT,
        help="the same for each time that the token was written",
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), hidden=True, help="pairs (token id, number added to its logit)"
    )
    no_repeat_ngram_size: int = option(
        0,
        low=0,
        high=MAX_NGRAM,
        metavar="N",
        group=_CONTENT,
        help="never write N tokens twice in the same order",
    )
    bad_words: tuple[str, ...] = option(
        (), flags="--ban", metavar="TEXT", group=_CONTENT, help="never write this string"
    )
    suppress_tokens: tuple[int, ...] = option(
        (),
        low=0,
        high=MAX_ID,
        flags="--ban-id",
        metavar="ID",
        group=_CONTENT,
        help="never write this token id",
    )
    allow_tokens: tuple[int, ...] = option(
        (),
        low=0,
        high=MAX_ID,
        flags="--allow-id",
        metavar="ID",
        group=_CONTENT,
        help="allow an id that is banned by default: [UNK], special and reserved ones",
    )
    forced_start: str = option(
        "", metavar="TEXT", group=_CONTENT, help="text that the continuation starts with"
    )
    forced_end: str = option(
        "", metavar="TEXT", group=_CONTENT, help="text that ends it where it has its full length"
    )
    forced_ids: tuple[tuple[int, int], ...] = option(
        (), hidden=True, help="pairs (number of the new token, id); below 0 from the end"
    )
    num_return_sequences: int = option(
        1,
        low=1,
        high=MAX_TEXTS,
        flags=("-n", "--num-return-sequences"),
        metavar="N",
        group=_WORK,
        help="texts for each prompt",
    )
    window_keep: int | None = option(
        None,
        low=1,
        high=MAX_TOKENS,
        metavar="N",
        default_text="half of it",
        group=_WORK,
        help="tokens kept when the model's window is full and slides on",
    )
    on_long_prompt: Literal["cut", "error"] = option(
        "cut", group=_WORK, help="what to do with a prompt that the model can't see at once"
    )
    prompt_lookup_num_tokens: int = option(
        0,
        low=0,
        high=64,
        flags="--prompt-lookup",
        metavar="N",
        group=_WORK,
        help="guess N tokens from earlier text and check them at once; the text stays the same",
    )
    num_assistant_tokens: int = option(
        3,
        low=0,
        high=64,
        flags="--assistant-tokens",
        metavar="N",
        group=_WORK,
        help="tokens that the assistant, where there is one, drafts at once",
    )

    adapter: str | None = option(
        None, hidden=True, help="the LoRA adapter to write with, by the name it was added under"
    )

    def __post_init__(self) -> None:
        for name in _STRINGS:
            self._normalize(name, _strings(name, getattr(self, name)))
        for name in _IDS:
            self._normalize(name, _ids(name, getattr(self, name)))
        self._normalize("forced_ids", _pairs(self.forced_ids))
        self._normalize("logit_bias", _biases(self.logit_bias))
        check_options(self)
        self._check_combinations()

    def _normalize(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_combinations(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                "{min_new_tokens} is {}, more than {max_new_tokens}, {}; raise the one or lower "
                "the other",
                self.min_new_tokens,
                self.max_new_tokens,
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise OptionError(
                "{num_return_sequences} is {}, more than {num_beams}, {}; raise {num_beams}",
                self.num_return_sequences,
                self.num_beams,
            )
        if self.num_beams > 1 and self.prompt_lookup_num_tokens:
            raise OptionError(
                "{prompt_lookup_num_tokens} speeds up sampling and greedy choice, not beam search; "
                "set it to 0 or {num_beams} to 1"
            )

    @property
    def samples(self) -> bool:
        """Whether anything is drawn at random."""
        # Logits divided by less would overflow; so cold, only the best token has any chance.
        warm = self.temperature > _COLDEST
        return self.do_sample and warm and self.num_beams == 1

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with other values; raises `ValueError` for unknown names too."""
        check_names(GenerationConfig, changes, "generation option")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """The inverse of `to_dict`; what is not given has its default."""
        check_names(GenerationConfig, values, "generation option")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON types."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed[field.name] = _as_lists(value)
        return changed


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise OptionError(
            _named(name) + " is {!r}; expected a whole number from {} to {}", value, low, high
        )


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low <= value <= high):  # type: ignore[operator]
        raise OptionError(
            _named(name) + " is {!r}; expected a number from {:g} to {:g}", value, low, high
        )


def _named(name: str) -> str:
    """The template of an error that names a field, or a part of one behind a colon."""
    field, colon, part = name.partition(":")
    return "{" + field + "}" + colon + part


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else _items(name, value, "strings")
    for item in values:
        if not isinstance(item, str) or not item:
            raise OptionError(
                _named(name) + " holds {!r}; expected strings of one character or more", item
            )
    return values


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    values = (value,) if isinstance(value, int) else _items(name, value, "token ids")
    for item in values:
        _check_integer(name, item, 0, MAX_ID)
    return values


def _pairs(value: object) -> tuple[tuple[int, int], ...]:
    if isinstance(value, Mapping):
        value = value.items()
    pairs = tuple(_items("forced_ids", pair, "pairs") for pair in _items("forced_ids", value, ""))
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"forced_ids holds {pair!r}; expected pairs (place, token id)")
        _check_integer("forced_ids: place", pair[0], -(2**31), 2**31)
        _check_integer("forced_ids: token id", pair[1], 0, 2**31)
    return pairs


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if isinstance(value, Mapping):
        value = value.items()
    pairs = tuple(_items("logit_bias", pair, "pairs") for pair in _items("logit_bias", value, ""))
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"logit_bias holds {pair!r}; expected pairs (token id, number)")
        _check_integer("logit_bias: token id", pair[0], 0, 2**31)
        _check_number("logit_bias: number", pair[1], -1000.0, 1000.0)
    return pairs


def _items(name: str, value: object, what: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}; expected a sequence{' of ' * bool(what)}{what}")
    return tuple(value)


def _as_lists(value: object) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
