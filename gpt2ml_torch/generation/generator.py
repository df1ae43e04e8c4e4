"""Generator: continue texts with a model, one or many at a time, as a whole or piece by piece."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch.checkpoint import read_metadata
from gpt2ml_torch.generation.choosing import Chooser
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Completion, Text
from gpt2ml_torch.model import GPT2ML, KVCache
from gpt2ml_torch.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

CUDA_BURST = 8  # tokens decoded between two looks at them, where looking means to wait for the GPU


class Generator:
    """Continues texts: `Generator(model, tokenizer).generate("今天天气不错", top_k=5)`.

    Options are those of `GenerationConfig`; `defaults` replaces its defaults (else those that came
    with the model's file, if any). At most `batch_size` texts are decoded at once, which bounds the
    memory of the key-value cache. With `compile`, the first call of each size compiles. Each row
    has a random stream of its own, made of the seed and its number, so what it draws depends on
    nothing else.
    """

    def __init__(
        self,
        model: GPT2ML,
        tokenizer: Tokenizer,
        *,
        compile: bool = True,
        defaults: GenerationConfig | Mapping[str, Any] | None = None,
        batch_size: int | None = None,
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
        self.batch_size = batch_size or (32 if self.engine.on_cuda else 8)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        compile: bool = True,
        batch_size: int | None = None,
    ) -> Generator:
        """Model, vocabulary and defaults of one converted file."""
        return cls(
            GPT2ML.from_pretrained(path, device=device, dtype=dtype),
            Tokenizer.from_pretrained(path),
            compile=compile,
            defaults=read_metadata(path).generation,
            batch_size=batch_size,
        )

    @property
    def weight_bytes(self) -> int:
        """What one decoding step reads: all weights but the position embedding."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        unread = self.model.position_embedding.weight.nbytes
        return sum(tensor.nbytes for tensor in tensors) - unread

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
        forced, banned = self._forced(config), self._banned(config)
        for first in range(0, len(texts), self.batch_size):
            batch = _Batch(
                self.engine,
                texts[first : first + self.batch_size],
                config,
                banned=banned,
                forced=forced,
                end_ids=self._end_ids(config),
                logprobs=logprobs,
                stats=Stats() if stats is None else stats,
            )
            yield from batch.write()


class _Batch:
    """Texts that are decoded together: row r of every tensor belongs to `texts[r]`."""

    def __init__(
        self,
        engine: Engine,
        texts: list[Text],
        config: GenerationConfig,
        *,
        banned: Tensor,
        forced: Mapping[int, int],
        end_ids: frozenset[int],
        logprobs: bool,
        stats: Stats,
    ) -> None:
        self._engine = engine
        self._texts = texts
        self._config = config
        self._logprobs = logprobs
        self._stats = stats
        assert config.seed is not None
        rows = engine.padded_rows(len(texts))
        self._chooser = Chooser(
            config,
            texts,
            seed=config.seed,
            banned=banned,
            end_ids=end_ids,
            forced=forced,
            rows=rows,
            full=engine.on_cuda,
        )
        needed = max(len(text.ids) - text.start for text in texts)
        self._cache = engine.new_cache(len(texts), max(needed + 1, engine.padded_tokens(needed)))

    def write(self) -> Iterator[tuple[Text, str]]:
        """Decode to the end of every text; yields what each token adds."""
        began = time.perf_counter()
        logits = self._read_prompts()
        self._stats.prompt_seconds += time.perf_counter() - began
        for number in itertools.count():
            began = time.perf_counter()
            ids, chosen_logprobs = self._choose_burst(logits)
            going = sum(not text.finished for text in self._texts)
            chosen_ids = ids.tolist()
            busy = time.perf_counter() - began
            for step, step_ids in enumerate(chosen_ids):
                for row, text in enumerate(self._texts):
                    if not text.finished:
                        piece = text.put(step_ids[row])
                        if self._logprobs and len(text.logprobs) < text.count:
                            text.logprobs.append(float(chosen_logprobs[step][row]))
                        yield text, piece
            if all(text.finished for text in self._texts):
                return
            resumed = time.perf_counter()
            last = self._drop_finished(ids[-1])
            self._make_room()
            logits = self._decode(last)
            logits = self._slide(logits)
            if number:
                self._stats.steps += len(ids)
                self._stats.step_tokens += len(ids) * going
                self._stats.step_seconds += busy + time.perf_counter() - resumed

    def _read_prompts(self) -> Tensor:
        """Logits after each prompt, (B, V); equal prompts are read once."""
        read: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        rows = []
        for row, text in enumerate(self._texts):
            window = tuple(text.ids[text.start :])
            if window not in read:
                read[window] = row, self._read(window, row)
                self._stats.prompt_tokens += len(window)
            source, logits = read[window]
            if source != row:
                self._copy_row(self._cache, source, self._cache, row, len(window))
            rows.append(logits)
        rows += [rows[0]] * (self._cache.keys.shape[1] - len(rows))
        return torch.cat(rows)

    def _read(self, ids: Sequence[int], row: int) -> Tensor:
        """Read a text into a row of the cache; logits after it, (1, V)."""
        if self._cache.keys.shape[1] == 1:
            return self._engine.prefill(ids, self._cache)
        alone = self._engine.new_cache(1, self._engine.padded_tokens(len(ids)))
        logits = self._engine.prefill(ids, alone)
        self._copy_row(alone, 0, self._cache, row, len(ids))
        return logits

    @staticmethod
    @torch.inference_mode()
    def _copy_row(source: KVCache, row: int, target: KVCache, to: int, length: int) -> None:
        target.keys[:, to, :length] = source.keys[:, row, :length]
        target.values[:, to, :length] = source.values[:, row, :length]

    @torch.inference_mode()
    def _choose_burst(self, logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Some tokens of each row, (n, B): one on the CPU, several where looking at them costs."""
        chosen, logprobs = [self._choose(logits)], []
        if self._logprobs:
            logprobs.append(_logprobs_of(logits, chosen[-1]))
        for _ in range(self._burst() - 1):
            logits = self._decode(chosen[-1], ahead=len(chosen))
            chosen.append(self._choose(logits))
            if self._logprobs:
                logprobs.append(_logprobs_of(logits, chosen[-1]))
        return torch.stack(chosen), logprobs

    def _choose(self, logits: Tensor) -> Tensor:
        ids = self._chooser.choose(logits)
        if self._config.bad_words:
            ids = self._avoid_bad_words(logits, ids)
        self._chooser.advance(ids)
        return ids

    def _avoid_bad_words(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Choose again, without the ids that would complete a bad word, until none does."""
        blocked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        while True:
            offenders = [
                (row, id_)
                for row, (text, id_) in enumerate(zip(self._texts, ids.tolist(), strict=False))
                if not text.finished and not blocked[row, id_] and text.offends(id_)
            ]
            if not offenders:
                return ids
            for row, id_ in offenders:
                blocked[row, id_] = True
            ids = self._chooser.choose(logits, blocked=blocked)

    def _burst(self) -> int:
        if not self._engine.on_cuda or self._config.bad_words or self._config.no_repeat_ngram_size:
            return 1
        open_texts = [text for text in self._texts if not text.finished]
        room = self._cache.length - 1 - max(text.position for text in open_texts)
        left = self._config.max_new_tokens - min(text.count for text in open_texts)
        return max(1, min(CUDA_BURST, room, left))

    def _decode(self, ids: Tensor, *, ahead: int = 0) -> Tensor:
        """Logits after these ids, (B,) -> (B, V), `ahead` tokens after those of the texts."""
        last = self._cache.length - 1
        places = [min(text.position + ahead, last) for text in self._texts]
        places += [0] * (len(ids) - len(places))
        positions = torch.tensor(places, device=ids.device)[:, None]
        return self._engine.decode(ids[:, None], positions, self._cache)[:, -1]

    def _drop_finished(self, ids: Tensor) -> Tensor:
        """Go on with fewer rows where that is a smaller batch."""
        going = [row for row, text in enumerate(self._texts) if not text.finished]
        padded = self._engine.padded_rows(len(going))
        if padded >= self._cache.keys.shape[1]:
            return ids
        smaller = self._engine.new_cache(len(going), self._cache.length)
        for to, row in enumerate(going):
            self._copy_row(self._cache, row, smaller, to, self._texts[row].position)
        self._cache = smaller
        self._chooser.select(going, padded)
        self._texts = [self._texts[row] for row in going]
        return ids[[*going, *[going[0]] * (padded - len(going))]]

    def _make_room(self) -> None:
        """Grow the cache where the next token needs a slot more."""
        needed = min(max(text.position for text in self._texts) + 1, self._engine.limit)
        if needed <= self._cache.length:
            return
        grown = self._engine.new_cache(len(self._texts), needed)
        for row in range(len(self._texts)):
            self._copy_row(self._cache, row, grown, row, self._cache.length)
        self._cache = grown

    def _slide(self, logits: Tensor) -> Tensor:
        """Where a text has outgrown the model's window, read its end anew, from position 0."""
        for row, text in enumerate(self._texts):
            if text.finished or text.position < self._engine.limit:
                continue
            text.start = len(text.ids) - (self._config.window_keep or (self._engine.limit + 1) // 2)
            logits = logits.clone()
            logits[row] = self._read(text.ids[text.start :], row)[0]
        return logits


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
