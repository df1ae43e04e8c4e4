"""GenerationConfig: how to continue a text, validated once; a model's file holds its defaults.

Names follow transformers' `generate`, which users know.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_INTEGERS = {  # name: smallest, largest
    "max_new_tokens": (1, 2**31),
    "min_new_tokens": (0, 2**31),
    "top_k": (0, 2**31),
    "no_repeat_ngram_size": (0, 2**31),
    "num_beams": (1, 1024),
    "num_return_sequences": (1, 2**20),
    "prompt_lookup_num_tokens": (0, 64),
    "num_assistant_tokens": (0, 64),
}
_NUMBERS = {  # name: smallest, largest, whether the smallest is allowed
    "temperature": (0.0, math.inf, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "typical_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, 1e6, False),
}
_SIGNED = ("presence_penalty", "frequency_penalty")  # from -2 to 2, as OpenAI's
_CHOICES = {"top_p_rule": ("huggingface", "grover"), "on_long_prompt": ("cut", "error")}
_STRINGS = ("stop", "bad_words")
_IDS = ("eos_token_id", "suppress_tokens", "allow_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a text. Raises `ValueError`, naming the field, for values that make no sense.

    Length and end:
        max_new_tokens, min_new_tokens: tokens written after the prompt. A stop string or end token
            that comes earlier than `min_new_tokens` does not stop the text.
        stop: strings that end the text; the first that is written is kept, the rest is not.
        eos_token_id: ids that end the text and are no part of it.
    Choice:
        do_sample: False, or a temperature of 0, takes the most probable token each time.
        temperature, top_k (0: all), top_p, min_p, typical_p: as in transformers, in this order.
        top_p_rule: "grover" is the original's: it drops the token that crosses top_p.
        seed: the same seed gives the same text; None draws one.
        num_beams: above 1, beam search: no sampling. length_penalty: a finished beam's summed
            log-probability is divided by its length to this power; 0 is bert4keras's plain sum.
    Content:
        repetition_penalty, no_repeat_ngram_size: as in transformers; the prompt counts.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens written before,
            once, and once for each time; from -2 to 2.
        logit_bias: pairs (token id, number added to its logit), or a mapping.
        bad_words: strings that are never written; suppress_tokens: ids that are never written.
        allow_tokens: ids to allow that are banned by default ([UNK], other special and reserved).
        forced_start, forced_end: text that the continuation starts with, and that its last tokens
            are where it reaches max_new_tokens.
        forced_ids: pairs (number of the new token, id); a negative number counts from the end.
    Working:
        num_return_sequences: texts for each prompt.
        window_keep: tokens kept when the model's window is full and slides on; None is half of it.
        on_long_prompt: "cut" (from the left, with a warning) or "error".
        prompt_lookup_num_tokens: above 0, speculative decoding: this many tokens are guessed from
            earlier text and checked at once; the text is the same, only sooner.
        num_assistant_tokens: the same with guesses of the generator's assistant, where it has one
            and decodes a text by itself; 0 does without.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_p_rule: Literal["huggingface", "grover"] = "huggingface"
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    no_repeat_ngram_size: int = 0
    bad_words: tuple[str, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    allow_tokens: tuple[int, ...] = ()
    forced_start: str = ""
    forced_end: str = ""
    forced_ids: tuple[tuple[int, int], ...] = ()
    num_return_sequences: int = 1
    window_keep: int | None = None
    on_long_prompt: Literal["cut", "error"] = "cut"
    prompt_lookup_num_tokens: int = 0
    num_assistant_tokens: int = 3

    def __post_init__(self) -> None:
        for name in _STRINGS:
            self._normalize(name, _strings(name, getattr(self, name)))
        for name in _IDS:
            self._normalize(name, _ids(name, getattr(self, name)))
        self._normalize("forced_ids", _pairs(self.forced_ids))
        self._normalize("logit_bias", _biases(self.logit_bias))
        self._check_values()
        self._check_combinations()

    def _normalize(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, high)
        for name, bounds in _NUMBERS.items():
            _check_number(name, getattr(self, name), *bounds)
        for name in _SIGNED:
            _check_number(name, getattr(self, name), -2.0, 2.0, True)
        _check_number("length_penalty", self.length_penalty, -math.inf, math.inf, True)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {choices}")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample is {self.do_sample!r}; expected True or False")
        for name in ("forced_start", "forced_end"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a string")
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.window_keep is not None:
            _check_integer("window_keep", self.window_keep, 1, 2**31)

    def _check_combinations(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, "
                f"{self.max_new_tokens}; raise the one or lower the other"
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams, "
                f"{self.num_beams}; raise num_beams"
            )
        if self.num_beams > 1 and self.prompt_lookup_num_tokens:
            raise ValueError(
                "prompt_lookup_num_tokens speeds up sampling and greedy choice, not beam search; "
                "set it to 0 or num_beams to 1"
            )

    @property
    def samples(self) -> bool:
        """Whether anything is drawn at random."""
        return self.do_sample and self.temperature > 0 and self.num_beams == 1

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with other values; raises `ValueError` for unknown names too."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """The inverse of `to_dict`; what is not given has its default."""
        _check_names(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON types."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed[field.name] = _as_lists(value)
        return changed


def _check_names(values: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown generation option {name!r}; {hint}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a whole number from {low} to {high}")


def _check_number(name: str, value: object, low: float, high: float, closed: bool) -> None:
    fits = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low <= value if closed else low < value)
        and value <= high
    )
    if not fits:
        bounds = f"{'from' if closed else 'above'} {low:g}" if math.isfinite(low) else "finite"
        bounds += f" up to {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{name} is {value!r}; expected a number, {bounds}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else _items(name, value, "strings")
    for item in values:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{name} holds {item!r}; expected strings of one character or more")
    return values


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    values = (value,) if isinstance(value, int) else _items(name, value, "token ids")
    for item in values:
        _check_integer(name, item, 0, 2**31)
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
        _check_number("logit_bias: number", pair[1], -1000.0, 1000.0, True)
    return pairs


def _items(name: str, value: object, what: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}; expected a sequence{' of ' * bool(what)}{what}")
    return tuple(value)


def _as_lists(value: object) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
