"""Constraints on a text: which tokens are allowed and where it ends. The sampler draws the tokens.

Shapes:
    V  vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constraints:
    """Bans, forced ids, penalties and ends of one text; several texts may share them.

    Tokens in `banned`, (V,) bool, are never chosen, `end_ids` not before `min_new_tokens`. `forced`
    maps the number of a new token to its id, which is chosen regardless of all other rules.
    """

    banned: Tensor
    bad_words: tuple[str, ...] = ()
    forced: Mapping[int, int] = dataclasses.field(default_factory=dict)
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    max_new_tokens: int = 256

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> Constraints:
        """The constraints of a configuration, for a model with `vocab_size` rows of embeddings.

        Raises `ValueError` for ids that the model lacks, if every token is banned, and for forced
        tokens that `max_new_tokens` has no room for.
        """
        _check_ids(config, vocab_size)
        end_ids = _end_ids(config, tokenizer)
        return cls(
            banned=_banned(config, tokenizer, end_ids, vocab_size).to(device),
            bad_words=config.bad_words,
            forced=MappingProxyType(_forced(config, tokenizer)),
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            logit_bias=config.logit_bias,
            end_ids=end_ids,
            stop=config.stop,
            min_new_tokens=config.min_new_tokens,
            max_new_tokens=config.max_new_tokens,
        )


class RepeatedNGrams:
    """The tokens that would complete an n-gram that a growing text already holds.

    It reads the growing list of the text's ids, at a constant cost for each new id.
    Source: transformers, NoRepeatNGramLogitsProcessor.
    """

    def __init__(self, ids: Sequence[int], size: int) -> None:
        self._ids = ids
        self._size = size
        self._read = size - 1  # index of the first id that no n-gram in the table includes
        # The hash of n - 1 ids -> each id that came next, and an index where it did.
        self._next: dict[int, dict[int, int]] = {}

    def banned(self) -> list[int]:
        """The ids that may not come next."""
        for place in range(self._read, len(self._ids)):
            following = self._next.setdefault(hash(self._before(place)), {})
            following.setdefault(self._ids[place], place)
        self._read = max(self._read, len(self._ids))
        if len(self._ids) < self._size - 1:
            return []
        recent = self._before(len(self._ids))
        following = self._next.get(hash(recent), {})
        return [id_ for id_, place in following.items() if self._before(place) == recent]

    def _before(self, place: int) -> tuple[int, ...]:
        return tuple(self._ids[place - self._size + 1 : place])

    def follow(self, ids: Sequence[int]) -> RepeatedNGrams:
        """A copy that follows another list, whose beginning is the ids read so far."""
        other = RepeatedNGrams(ids, self._size)
        other._read = self._read
        other._next = {key: dict(following) for key, following in self._next.items()}
        return other


def _check_ids(config: GenerationConfig, vocab_size: int) -> None:
    paired = [id_ for _, id_ in config.forced_ids] + [id_ for id_, _ in config.logit_bias]
    for id_ in (*config.eos_token_id, *config.suppress_tokens, *config.allow_tokens, *paired):
        if id_ >= vocab_size:
            raise ValueError(
                f"token id {id_} is out of range; the model has ids 0 to {vocab_size - 1}"
            )


def _end_ids(config: GenerationConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """End tokens given by id, or as a stop string that is a special token such as [SEP]."""
    special = {tokenizer.id_to_token(id_): id_ for id_ in tokenizer.special_ids}
    return frozenset(config.eos_token_id) | {special[s] for s in config.stop if s in special}


def _banned(
    config: GenerationConfig, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int
) -> Tensor:
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    banned[tokenizer.num_embeddings :] = True
    banned[list(tokenizer.banned_ids)] = True
    banned[[*config.allow_tokens, *end_ids]] = False
    banned[list(config.suppress_tokens)] = True
    if banned.all():
        raise OptionError("every token is banned; leave some out of {suppress_tokens}")
    return banned


def _forced(config: GenerationConfig, tokenizer: Tokenizer) -> dict[int, int]:
    """Forced tokens: the number of a new token -> its id."""
    start = tokenizer.encode(config.forced_start)
    end = tokenizer.encode(config.forced_end)
    first_of_end = config.max_new_tokens - len(end)
    if len(start) > first_of_end:
        raise OptionError(
            "{max_new_tokens} is {}; {forced_start} and {forced_end} take {} tokens: raise it",
            *(config.max_new_tokens, len(start) + len(end)),
        )
    forced = dict(enumerate(start)) | dict(enumerate(end, start=first_of_end))
    for place, id_ in config.forced_ids:
        forced[place if place >= 0 else config.max_new_tokens + place] = id_
    return forced
