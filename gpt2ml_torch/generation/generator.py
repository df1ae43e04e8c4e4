"""Generator: continue texts with a model, one or many at a time, as a whole or piece by piece."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.beam_search import BeamSearch
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.guessing import Assistant, Guesser, PromptLookup
from gpt2ml_torch.generation.scoring import Score, token_logprobs
from gpt2ml_torch.generation.speculative import SpeculativeBatch
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Completion, Text
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile.pretrained import AUTO, activation_dtype
from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.precision import Precision
from gpt2ml_torch.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)


class Generator:
    """Continues texts: `Generator(model, tokenizer).generate("今天天气不错", top_k=5)`.

    Options are those of `GenerationConfig`; `defaults` replaces its defaults (else those that came
    with the model's file, if any). At most `batch_size` texts are decoded at once, which bounds the
    memory of the key-value cache. With `compile`, the first call of each size compiles, except for
    weights packed on a CPU with kernels, which are compiled already. Each row has a random stream
    of its own, made of the seed and its number, so what it draws depends on nothing else.

    An `assistant` is a cheaper model with the same vocabulary, such as this one in int4. Where one
    text is decoded, it guesses tokens that `model` then checks several at a time: the text is that
    of `model`, only sooner (see `num_assistant_tokens`).
    """

    def __init__(
        self,
        model: GPT2ML,
        tokenizer: Tokenizer,
        *,
        compile: bool = True,
        defaults: GenerationConfig | Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        assistant: GPT2ML | None = None,
    ) -> None:
        if tokenizer.num_embeddings > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_embeddings} ids, the model embeds "
                f"{model.config.vocab_size}; take the vocabulary that belongs to the model"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self.model = model.eval()
        self.tokenizer = tokenizer
        if defaults is None:
            defaults = getattr(model, "generation_defaults", None) or {}
        if not isinstance(defaults, GenerationConfig):
            defaults = GenerationConfig.from_dict(defaults)
        self.defaults = defaults
        self.engine = Engine(model, compile=compile)
        self.assistant: Engine | None = None
        if assistant is not None:
            _check_assistant(assistant, model)
            self.assistant = Engine(assistant.eval(), compile=compile)
        self.batch_size = batch_size or (32 if self.engine.on_cuda else 8)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Precision | str | None = AUTO,
        compile: bool = True,
        batch_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        assistant: Precision | str | None = None,
    ) -> Generator:
        """Model, vocabulary and defaults of one model file.

        `quantize` and `dtype` are those of `GPT2ML.from_pretrained`; "auto" takes the fastest safe
        precision of the device. `tokenizer` is for files that hold no vocabulary. `assistant`, a
        precision such as "int4", also loads the weights in this precision as a draft model.
        """
        with ModelFile.open(path) as file:
            return cls.from_file(
                file,
                device=device,
                dtype=dtype,
                precision=quantize,
                compile=compile,
                batch_size=batch_size,
                tokenizer=tokenizer,
                assistant=assistant,
            )

    @classmethod
    def from_file(
        cls,
        file: ModelFile,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        precision: Precision | str | None = AUTO,
        compile: bool = True,
        batch_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        assistant: Precision | str | None = None,
    ) -> Generator:
        """As `from_pretrained`, from a file that is open already."""

        def load(precision: Precision | str | None, dtype: torch.dtype | None) -> GPT2ML:
            if dtype is None and precision not in (None, AUTO):
                dtype = activation_dtype(precision)
            return GPT2ML.from_file(file, device=device, dtype=dtype, precision=precision)

        if tokenizer is None:
            tokenizer = file.tokenizer()
        model = load(precision, dtype)
        draft = None if assistant is None else load(assistant, None)
        return cls(model, tokenizer, compile=compile, batch_size=batch_size, assistant=draft)

    # -- the public ways to write -----------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig | None = None,
        *,
        return_full_text: bool = True,
        **options: Any,
    ) -> list[str]:
        """The prompts, as typed, with their continuations: `num_return_sequences` for each, in
        order; without `return_full_text` the continuations alone.

        Raises `ValueError` for options that make no sense and for prompts without a token.
        """
        completions = self.complete(prompts, config, **options)
        return [text.full_text if return_full_text else text.text for text in completions]

    def complete(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig | None = None,
        *,
        logprobs: bool = False,
        stats: Stats | None = None,
        **options: Any,
    ) -> list[Completion]:
        """As `generate`, with token ids, the reason to stop and, on request, log-probabilities."""
        texts, config = self._begin(prompts, config, options)
        for _ in self._write_all(texts, config, stats, logprobs=logprobs):
            pass
        return [text.completion() for text in texts]

    def stream(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        *,
        return_full_text: bool = True,
        stats: Stats | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The pieces of one text as they are written; joined they are the text of `generate`.

        The first piece is the prompt. Closing the iterator stops the work.
        """
        if not isinstance(prompt, str):
            raise ValueError("stream takes one prompt, a string; stream_many takes several")
        pieces = self.stream_many(
            prompt, config, return_full_text=return_full_text, stats=stats, **options
        )
        return (piece for row, piece in pieces if row == 0)

    def stream_many(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig | None = None,
        *,
        return_full_text: bool = True,
        stats: Stats | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """As `stream` for several texts: pairs of the text's number in `generate` and a piece."""
        texts, config = self._begin(prompts, config, options)
        return self._pieces(texts, config, return_full_text, stats)

    def _pieces(
        self,
        texts: list[Text],
        config: GenerationConfig,
        with_prompt: bool,
        stats: Stats | None,
    ) -> Iterator[tuple[int, str]]:
        if with_prompt:
            yield from ((text.row, text.prompt) for text in texts)
        for text, piece in self._write_all(texts, config, stats):
            if piece:
                yield text.row, piece

    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """The log-likelihood and perplexity of given texts.

        Texts longer than the model's window are read in windows that overlap by half. Raises
        `ValueError` for a text without a token.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        ids = [self._encode(text) for text in given]
        logprobs = token_logprobs(self.model, ids, batch_size=self.batch_size)
        return [
            Score(text, tuple(text_ids), tuple(values))
            for text, text_ids, values in zip(given, ids, logprobs, strict=True)
        ]

    # -- options and prompts ----------------------------------------------------------------------

    def _begin(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig | None,
        options: Mapping[str, Any],
    ) -> tuple[list[Text], GenerationConfig]:
        config = (self.defaults if config is None else config).replace(**options)
        self._check_ids(config)
        if config.seed is None:
            config = config.replace(seed=secrets.randbits(63))
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._texts(prompts, config), config

    def _check_ids(self, config: GenerationConfig) -> None:
        forced = [id_ for _, id_ in config.forced_ids]
        for id_ in (*config.eos_token_id, *config.suppress_tokens, *config.allow_tokens, *forced):
            if id_ >= self.model.config.vocab_size:
                raise ValueError(
                    f"token id {id_} is out of range; the model has ids 0 to "
                    f"{self.model.config.vocab_size - 1}"
                )
        keep = config.window_keep
        if keep is not None and keep >= self.engine.limit:
            raise ValueError(
                f"window_keep is {keep}; expected less than the model's {self.engine.limit} "
                "positions, so that the text can go on"
            )

    def _texts(self, prompts: Sequence[str], config: GenerationConfig) -> list[Text]:
        end_ids = self._end_ids(config)
        texts: list[Text] = []
        for prompt in prompts:
            ids = self._encode(prompt)
            start = self._window_start(len(ids), config)
            for _ in range(config.num_return_sequences):
                text = Text(
                    row=len(texts),
                    prompt=prompt,
                    prompt_ids=ids,
                    tokenizer=self.tokenizer,
                    config=config,
                    end_ids=end_ids,
                )
                text.start = start
                texts.append(text)
        return texts

    def _encode(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {type(prompt).__name__}; expected str")
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError(
                f"the prompt {prompt!r} holds no token, and the model knows no begin token: "
                "give at least one character"
            )
        return ids

    def _window_start(self, length: int, config: GenerationConfig) -> int:
        excess = length - self.engine.limit
        if excess <= 0:
            return 0
        if config.on_long_prompt == "error":
            raise ValueError(
                f"a prompt has {length} tokens, the model sees {self.engine.limit} at once: "
                "shorten it, or let it be cut with on_long_prompt='cut'"
            )
        _logger.warning(
            "a prompt of %d tokens was cut to its last %d, all that the model sees at once",
            *(length, self.engine.limit),
        )
        return excess

    def _end_ids(self, config: GenerationConfig) -> frozenset[int]:
        """End tokens given by id, or as a stop string that is a special token such as [SEP]."""
        special = {self.tokenizer.id_to_token(id_): id_ for id_ in self.tokenizer.special_ids}
        return frozenset(config.eos_token_id) | {special[s] for s in config.stop if s in special}

    def _forced(self, config: GenerationConfig) -> dict[int, int]:
        """The number of a new token -> its id."""
        start = self.tokenizer.encode(config.forced_start)
        end = self.tokenizer.encode(config.forced_end)
        first_of_end = config.max_new_tokens - len(end)
        if len(start) > first_of_end:
            raise ValueError(
                f"max_new_tokens is {config.max_new_tokens}; forced_start and forced_end take "
                f"{len(start) + len(end)} tokens: raise it"
            )
        forced = dict(enumerate(start)) | dict(enumerate(end, start=first_of_end))
        for place, id_ in config.forced_ids:
            forced[place if place >= 0 else config.max_new_tokens + place] = id_
        return forced

    def _banned(self, config: GenerationConfig) -> Tensor:
        vocab_size = self.model.config.vocab_size
        banned = torch.zeros(vocab_size, dtype=torch.bool)
        banned[self.tokenizer.num_embeddings :] = True
        banned[list(self.tokenizer.banned_ids)] = True
        banned[[*config.allow_tokens, *self._end_ids(config)]] = False
        banned[list(config.suppress_tokens)] = True
        if banned.all():
            raise ValueError("every token is banned; leave some out of suppress_tokens")
        return banned.to(self.model.device)

    # -- the loop ---------------------------------------------------------------------------------

    def _write_all(
        self,
        texts: list[Text],
        config: GenerationConfig,
        stats: Stats | None,
        *,
        logprobs: bool = False,
    ) -> Iterator[tuple[Text, str]]:
        rules: dict[str, Any] = {
            "banned": self._banned(config),
            "forced": self._forced(config),
            "end_ids": self._end_ids(config),
        }
        if config.num_beams > 1:
            if logprobs:
                raise ValueError("log-probabilities of beams are not kept; see Completion.score")
            yield from self._search_all(texts, config, rules)
            return
        rules |= {"logprobs": logprobs, "stats": Stats() if stats is None else stats}
        size = 1 if config.prompt_lookup_num_tokens else self.batch_size
        for first in range(0, len(texts), size):
            yield from self._batch(texts[first : first + size], config, rules).write()

    def _batch(self, texts: list[Text], config: GenerationConfig, rules: dict[str, Any]) -> Batch:
        """The fastest way to decode these texts."""
        guesses = config.prompt_lookup_num_tokens
        guesser: Guesser = PromptLookup()
        if not guesses and self.assistant is not None and len(texts) == 1:
            guesses = config.num_assistant_tokens
            length = len(texts[0].ids) - texts[0].start + config.max_new_tokens
            guesser = Assistant(self.assistant, min(length, self.engine.limit))
        if not guesses:
            return Batch(self.engine, texts, config, **rules)
        return SpeculativeBatch(
            self.engine, texts, config, guesser=guesser, guesses=guesses, **rules
        )

    def _search_all(
        self, texts: list[Text], config: GenerationConfig, rules: dict[str, Any]
    ) -> Iterator[tuple[Text, str]]:
        """Beam search for each prompt; its best texts take the places of the prompt's copies."""
        for first in range(0, len(texts), config.num_return_sequences):
            found = BeamSearch(self.engine, texts[first].copy(), config, **rules).search()
            for text, result in zip(texts[first:], found, strict=False):
                text.become(result)
                yield text, text.written


def _check_assistant(assistant: GPT2ML, model: GPT2ML) -> None:
    for what in ("vocab_size", "max_position_embeddings"):
        found, expected = getattr(assistant.config, what), getattr(model.config, what)
        if found != expected:
            raise ValueError(
                f"the assistant's {what} is {found}, the model's {expected}; take a model of the "
                "same vocabulary and length"
            )
    if assistant.device != model.device:
        raise ValueError(
            f"the assistant is on {assistant.device}, the model on {model.device}; move one"
        )
