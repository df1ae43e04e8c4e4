"""Generator: continue texts with a model, one or many at a time, as a whole or piece by piece."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from gpt2ml_torch import kernels
from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.beam_search import search_all
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.constraints import Constraints
from gpt2ml_torch.generation.draft import Draft, DraftModel, PromptLookup, check_assistant
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.scoring import Score, token_logprobs
from gpt2ml_torch.generation.speculative import SpeculativeBatch
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Completion, Text, shortened
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile.pretrained import AUTO, activation_dtype
from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.openmp import release_threads
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.precision import Precision
from gpt2ml_torch.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

Configs = GenerationConfig | Sequence[GenerationConfig] | None


class Generator:
    """Continues texts: `Generator(model, tokenizer).generate("今天天气不错", top_k=5)`.

    Options are the fields of `GenerationConfig`; `defaults` replaces its defaults (otherwise
    the model file's, if it has any, do). At most `batch_size` texts are decoded at once, which
    bounds the memory of the key-value cache. With `compile`, the first call of each size
    compiles, except for weights packed on a CPU with kernels, which are compiled already. Each
    row has a random stream of its own, made of the seed and its number, so what it draws
    depends on nothing else.

    With `pack`, a plain model on a CPU with kernels is packed in place, for several times the speed
    and without a second copy (`kernels.pack_for_decoding`); `unpack` undoes it.

    An `assistant` is a cheaper model with the same vocabulary, such as this one in int4. Where one
    text is decoded, it drafts tokens that `model` then checks several at a time: the text is the
    model's own, only sooner (see `num_assistant_tokens`).
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
        pack: bool = True,
    ) -> None:
        if tokenizer.num_embeddings > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_embeddings} ids, the model embeds "
                f"{model.config.vocab_size}; take the vocabulary that belongs to the model"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        for each in (model, assistant):
            if pack and each is not None:
                kernels.pack_for_decoding(each)
        self.model = model.eval()
        self.tokenizer = tokenizer
        if defaults is None:
            defaults = getattr(model, "generation_defaults", None) or {}
        if not isinstance(defaults, GenerationConfig):
            defaults = GenerationConfig.from_dict(defaults)
        self.defaults = defaults
        self._compile = compile
        self.engine = Engine(model, compile=compile)
        self.assistant: Engine | None = None
        if assistant is not None:
            check_assistant(assistant, model)
            self.assistant = Engine(assistant.eval(), compile=compile)
        self.batch_size = batch_size or (32 if self.engine.on_cuda else 8)
        release_threads()  # of the loading, so that any thread writes at full speed

    def add_adapter(self, name: str, adapter: kernels.PackedAdapter) -> None:
        """Let texts be written with a LoRA adapter, which the option `adapter=name` chooses.

        `finetuning.load_adapter` reads one. The weights stay as they are and are shared by all
        adapters. Raises `ValueError` for a model without packed weights or kernels.
        """
        self.engine.add_adapter(name, adapter)

    def unpack(self) -> None:
        """Restore the model's plain weights, bit for bit unless they were rounded to integers."""
        kernels.unpack_model(self.model)
        self.engine = Engine(self.model, compile=self._compile)

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

        `quantize` and `dtype` work as in `GPT2ML.from_pretrained`; "auto" takes the fastest safe
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
        settings: dict[str, Any] = {"compile": compile, "batch_size": batch_size, "pack": False}
        return cls(model, tokenizer, assistant=draft, **settings)

    # -- the public ways to write -----------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        config: Configs = None,
        *,
        return_full_text: bool = True,
        **options: Any,
    ) -> list[str]:
        """The prompts, as typed, with their continuations: `num_return_sequences` for each, in
        order; without `return_full_text` the continuations alone.

        `config` may be a list, one configuration for each prompt: they are decoded together, and
        each text is the one that `generate` writes for its prompt and configuration alone.
        `options` change all of them. Raises `ValueError` for options that make no sense and for
        prompts without a token.
        """
        completions = self.complete(prompts, config, **options)
        return [text.full_text if return_full_text else text.text for text in completions]

    def complete(
        self,
        prompts: str | Sequence[str],
        config: Configs = None,
        *,
        logprobs: bool = False,
        stats: Stats | None = None,
        **options: Any,
    ) -> list[Completion]:
        """As `generate`, with token ids, the reason to stop and, on request, log-probabilities."""
        texts = self._begin(prompts, config, options)
        for _ in self._write_all(texts, stats, logprobs=logprobs):
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
        config: Configs = None,
        *,
        return_full_text: bool = True,
        stats: Stats | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """As `stream` for several texts: pairs of the text's number in `generate` and a piece."""
        texts = self._begin(prompts, config, options)
        return self._pieces(texts, return_full_text, stats)

    def _pieces(
        self, texts: list[Text], with_prompt: bool, stats: Stats | None
    ) -> Iterator[tuple[int, str]]:
        if with_prompt:
            yield from ((text.row, text.prompt) for text in texts)
        for text, piece in self._write_all(texts, stats):
            if piece:
                yield text.row, piece

    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """The log-likelihood and perplexity of given texts.

        Each token is predicted from as many tokens before it as fit. Raises `ValueError` for a
        text without a token, and for logits that are not finite.
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
        self, prompts: str | Sequence[str], config: Configs, options: Mapping[str, Any]
    ) -> list[Text]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if config is None or isinstance(config, GenerationConfig):
            config = self._complete_config(config, options)
            return self._texts(prompts, [config] * len(prompts))
        configs = [self._complete_config(one, options) for one in config]
        if len(configs) != len(prompts):
            raise ValueError(
                f"config holds {len(configs)} configurations for {len(prompts)} prompts; give one "
                "for each prompt, or a single one for all"
            )
        return self._texts(prompts, configs, separate=True)

    def _complete_config(
        self, config: GenerationConfig | None, options: Mapping[str, Any]
    ) -> GenerationConfig:
        config = (self.defaults if config is None else config).replace(**options)
        self.engine.adapters.number(config.adapter)  # an error for one that was not added
        keep = config.window_keep
        if keep is not None and keep >= self.engine.limit:
            raise OptionError(
                "{window_keep} is {}; expected less than the model's {} positions, so that the "
                "text can go on",
                *(keep, self.engine.limit),
            )
        return config if config.seed is not None else config.replace(seed=secrets.randbits(63))

    def _texts(
        self,
        prompts: Sequence[str],
        configs: Sequence[GenerationConfig],
        *,
        separate: bool = False,
    ) -> list[Text]:
        """The texts to write; `separate` prompts number their random streams from 0 each."""
        constraints: dict[GenerationConfig, Constraints] = {}
        texts: list[Text] = []
        for prompt, config in zip(prompts, configs, strict=True):
            if config not in constraints:
                constraints[config] = self._constraints(config)
            ids = self._encode(prompt)
            start = self._window_start(len(ids), config)
            first = len(texts)
            for _ in range(config.num_return_sequences):
                text = Text(
                    row=len(texts),
                    stream=len(texts) - (first if separate else 0),
                    prompt=prompt,
                    prompt_ids=ids,
                    tokenizer=self.tokenizer,
                    config=config,
                    constraints=constraints[config],
                )
                text.start = start
                texts.append(text)
        return texts

    def new_text(
        self, prompt: str | Sequence[int], config: GenerationConfig, *, sample: int = 0
    ) -> Text:
        """Text number `sample` that `generate` would write for a prompt, before it is read.

        For schedulers. The prompt may be token ids. Raises `ValueError` as `generate` does.
        """
        config = self._complete_config(config, {})
        ids = list(prompt) if not isinstance(prompt, str) else self._encode(prompt)
        shown = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        text = Text(
            row=0,
            stream=sample,
            prompt=shown,
            prompt_ids=ids,
            tokenizer=self.tokenizer,
            config=config,
            constraints=self._constraints(config),
        )
        text.start = self._window_start(len(ids), config)
        return text

    def _constraints(self, config: GenerationConfig) -> Constraints:
        return Constraints.of(
            config,
            self.tokenizer,
            vocab_size=self.model.config.vocab_size,
            device=self.model.device,
        )

    def _encode(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {type(prompt).__name__}; expected str")
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError(
                f"the prompt {shortened(prompt)!r} holds no token, and the model knows no begin "
                "token: give at least one character"
            )
        return ids

    def _window_start(self, length: int, config: GenerationConfig) -> int:
        excess = length - self.engine.limit
        if excess <= 0:
            return 0
        if config.on_long_prompt == "error":
            raise OptionError(
                "a prompt has {} tokens, the model sees {} at once: shorten it, or let it be cut "
                "with {on_long_prompt=cut}",
                *(length, self.engine.limit),
            )
        _logger.warning(
            "a prompt of %d tokens was cut to its last %d, all that the model sees at once",
            *(length, self.engine.limit),
        )
        return excess

    # -- the loop ---------------------------------------------------------------------------------

    def _write_all(
        self, texts: list[Text], stats: Stats | None, *, logprobs: bool = False
    ) -> Iterator[tuple[Text, str]]:
        stats = Stats() if stats is None else stats
        for engine in (self.engine, self.assistant):
            if engine is not None:
                engine.refresh()
        searched = [text for text in texts if text.config.num_beams > 1]
        if searched and logprobs:
            raise ValueError("log-probabilities of beams are not kept; see Completion.score")
        yield from search_all(self.engine, searched)
        others = [text for text in texts if text.config.num_beams == 1]
        looking_up = [text for text in others if text.config.prompt_lookup_num_tokens]
        for text in looking_up:
            yield from self._looking_up(text, logprobs, stats).write()
        together = [text for text in others if not text.config.prompt_lookup_num_tokens]
        for first in range(0, len(together), self.batch_size):
            batch = together[first : first + self.batch_size]
            yield from self._batch(batch, logprobs, stats).write()

    def _looking_up(self, text: Text, logprobs: bool, stats: Stats) -> Batch:
        draft, size = PromptLookup(), text.config.prompt_lookup_num_tokens
        return SpeculativeBatch(
            self.engine, text, draft=draft, size=size, logprobs=logprobs, stats=stats
        )

    def _batch(self, texts: list[Text], logprobs: bool, stats: Stats) -> Batch:
        """The fastest way to decode these texts."""
        size = texts[0].config.num_assistant_tokens
        if self.assistant is None or len(texts) > 1 or not size:
            return Batch(self.engine, texts, logprobs=logprobs, stats=stats)
        length = len(texts[0].ids) - texts[0].start + texts[0].to_come
        draft: Draft = DraftModel(self.assistant, min(length, self.engine.limit))
        return SpeculativeBatch(
            self.engine, texts[0], draft=draft, size=size, logprobs=logprobs, stats=stats
        )
