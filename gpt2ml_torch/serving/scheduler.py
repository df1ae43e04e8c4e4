"""Scheduler: continuous batching. Requests join and leave the batch at every step.

A thread runs one loop over a cache of fixed rows. Each turn it reads a chunk of at most one prompt
and then decodes one token of every running text. Running texts fill the first rows of the cache,
so that a step works on those alone. A text is exactly what `Generator` writes for its prompt,
configuration and sample number by itself.

Shapes:
    R  rows of the cache       A  running texts       T  tokens in this call       V  vocabulary
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch.generation import GenerationConfig, Generator
from gpt2ml_torch.generation.draft import DraftModel
from gpt2ml_torch.generation.finite import check_logits
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.serving.chunks import ChunkSize
from gpt2ml_torch.serving.handle import Handle, Piece, TokenInfo
from gpt2ml_torch.serving.logprobs import token_infos, wanted_infos
from gpt2ml_torch.serving.prefixes import PrefixCache, common_length
from gpt2ml_torch.serving.request import Request
from gpt2ml_torch.serving.rows import RowCache

__all__ = ["Handle", "Piece", "QueueFull", "Scheduler", "TokenInfo"]

_logger = logging.getLogger(__name__)

MAX_ROWS = 8
MAX_QUEUE = 64
PREFIX_TOKENS = 4096


class QueueFull(RuntimeError):
    """More texts wait than the scheduler may queue; try again later."""


class Scheduler:
    """Writes many texts at once with one generator, each with its own settings.

    `max_rows` texts run at a time, fewer if `max_memory` bytes hold less cache; up to `max_queue`
    more wait. `prefix_tokens` bounds the prefix cache. Start it with `start` or as a context
    manager; all methods may be called from any thread, and nothing else may use the generator
    meanwhile.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        max_rows: int = MAX_ROWS,
        max_memory: int | None = None,
        max_queue: int = MAX_QUEUE,
        prefix_tokens: int = PREFIX_TOKENS,
    ) -> None:
        self.generator = generator
        self._engine = generator.engine
        self._rows = RowCache(self._engine, max_rows=max_rows, max_memory=max_memory)
        self._prefixes = PrefixCache(prefix_tokens)
        self._max_queue = max_queue
        self._chunks = ChunkSize(generator.engine)
        self._draft: DraftModel | None = None
        if generator.assistant is not None:
            self._draft = DraftModel(generator.assistant, generator.engine.limit)
        self._running: list[Request] = []
        self._logits: Tensor | None = None  # (A, V), after each running text's last token
        self._sampler = self._new_sampler()
        self._reading: Request | None = None
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Scheduler:
        """Start the thread that reads and writes."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="gpt2ml-scheduler", daemon=True)
            self._thread.start()
        return self

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those under way end for so long, then cancel the rest."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._all_requests(), drain_seconds)
            for request in self._all_requests():
                request.cancelled = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- what a caller may ask --------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Texts under way that hold a row; a text whose last piece was given no longer counts."""
        writing = sum(not request.text.finished for request in list(self._running))
        return writing + (self._reading is not None)

    @property
    def queued(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the rows in use hold."""
        reading = self._reading
        held = sum(request.text.position + 1 for request in list(self._running))
        return held + (0 if reading is None else reading.read)

    @property
    def prefix_tokens(self) -> int:
        """Tokens in the prefix cache."""
        return self._prefixes.tokens

    def submit(
        self,
        prompt: str | Sequence[int],
        config: GenerationConfig | None = None,
        *,
        sample: int = 0,
        top_logprobs: int | None = None,
        **options: Any,
    ) -> Handle:
        """Queue one text; its handle gives the pieces.

        `config` and `options` work as in `Generator.generate`, and text number `sample` of a call
        with the same seed is what this writes. `top_logprobs` asks for the log-probabilities of the
        tokens and of so many alternatives. Raises `ValueError` as `generate` does, and `QueueFull`.
        """
        config = (self.generator.defaults if config is None else config).replace(**options)
        (handle,) = self.submit_many([prompt], config, samples=[sample], top_logprobs=top_logprobs)
        return handle

    def submit_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: GenerationConfig,
        *,
        samples: Sequence[int],
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
        only_read: bool = False,
    ) -> list[Handle]:
        """Queue several texts of one configuration, all or none; see `submit`.

        `prompt_logprobs` asks for log-probabilities of the prompts too, which are then read without
        the prefix cache; with `only_read` nothing is written.
        """
        if config.num_beams > 1:
            raise ValueError(f"num_beams is {config.num_beams}; the scheduler samples, expected 1")
        if config.seed is None:
            config = config.replace(seed=secrets.randbits(63))
        requests = [
            self._request(
                self.generator.new_text(prompt, config, sample=sample),
                top_logprobs=top_logprobs,
                prompt_logprobs=prompt_logprobs,
                only_read=only_read,
            )
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        with self._wake:
            if self._closing:
                raise QueueFull("the scheduler is closing")
            idle = self._rows.count - self.running
            if len(self._waiting) + len(requests) > self._max_queue + max(idle, 0):
                raise QueueFull(f"{len(self._waiting)} texts wait already; try again later")
            self._waiting.extend(requests)
            self._wake.notify_all()
        return [request.handle for request in requests]

    def _request(self, text: Text, **wishes: Any) -> Request:
        handle = Handle(text.prompt, text.ids, lambda: self._cancel(request))
        request = Request(text=text, handle=handle, **wishes)
        return request

    def _cancel(self, request: Request) -> None:
        with self._wake:
            request.cancelled = True
            self._wake.notify_all()

    # -- the loop ---------------------------------------------------------------------------------

    def _all_requests(self) -> list[Request]:
        reading = [] if self._reading is None else [self._reading]
        return [*self._running, *reading, *self._waiting]

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._all_requests())
                self._drop_cancelled()
                if self._closing and not self._all_requests():
                    self._wake.notify_all()
                    return
                self._admit()
            try:
                self._read()
                self._step()
            except Exception as error:
                self._fail(error)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            request.handle.put(Piece("", finish_reason="cancelled"))
        if self._reading is not None and self._reading.cancelled:
            self._reading.handle.put(Piece("", finish_reason="cancelled"))
            self._reading = None
        cancelled = [request for request in self._running if request.cancelled]
        for request in cancelled:
            request.handle.put(Piece("", finish_reason="cancelled"))
        self._keep([request for request in self._running if not request.cancelled])

    def _fail(self, error: Exception) -> None:
        """End what is under way; what waits goes on."""
        _logger.warning("texts under way were ended: %s", error)
        with self._wake:
            under_way = [*self._running, *([] if self._reading is None else [self._reading])]
            self._running, self._reading, self._logits = [], None, None
            self._sampler = self._new_sampler()
            self._wake.notify_all()
        # What is no number must reach no other text: not by a prefix, nor by slots that are masked.
        self._prefixes.clear()
        self._rows.clear()
        for request in under_way:
            request.handle.put(error)

    # -- prompts ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin with the next text where none is being read and a row is free."""
        if self._reading is None and self._waiting and len(self._running) < self._rows.count:
            request = self._waiting.popleft()
            # Running texts fill the rows below, and while this one is read their number only falls.
            request.row, request.read = len(self._running), 0
            self._reading = request

    @torch.inference_mode()
    def _read(self) -> None:
        """Read a part of the text whose turn it is."""
        request = self._reading
        if request is None:
            return
        window = request.window
        if not request.read and not request.prompt_logprobs:
            request.read = self._share(request, window)
            request.handle.cached_tokens = max(request.handle.cached_tokens, request.read)
        size = self._chunks.size(beside=bool(self._running)) if self._rows.chunked else len(window)
        part = window[request.read : request.read + size]
        began = time.perf_counter()
        logits = self._read_part(request, part)
        self._chunks.note_read(len(part), time.perf_counter() - began)
        request.read += len(part)
        if request.read == len(window):
            self._prefixes.add(window, self._rows.cache, request.row)
            self._begin_writing(request, logits)

    def _share(self, request: Request, window: Sequence[int]) -> int:
        """Copy the beginning of a window that is known already; returns how long it is.

        The last token is always read, for its logits.
        """
        longest, source = 0, None
        for row, other in enumerate(self._running):
            length = common_length(other.window, window)
            if length > longest:
                longest, source = length, row
        kept, entry = self._prefixes.match(window)
        count = min(max(longest, kept), len(window) - 1)
        if count and source is not None and longest >= kept:
            self._rows.copy(source, request.row, count)
        elif count and entry is not None:
            self._prefixes.copy_to(entry, count, self._rows.cache, request.row)
        return count

    def _read_part(self, request: Request, part: Sequence[int]) -> Tensor:
        """Logits after the part, (1, V)."""
        if not request.prompt_logprobs:
            return self._rows.read(request.row, part, request.read)
        logits = self._rows.read_all(request.row, part, request.read)  # (T, V)
        ids = request.window[request.read + 1 : request.read + len(part) + 1]
        infos = token_infos(logits[: len(ids)], ids, request.top_logprobs or 0)
        first = () if request.handle.prompt_tokens else (TokenInfo(request.window[0], None),)
        request.handle.prompt_tokens += (*first, *infos)
        return logits[-1:]

    def _begin_writing(self, request: Request, logits: Tensor) -> None:
        self._reading = None
        request.prompt_logprobs = False  # they are there; the window may be read again later
        if request.only_read:
            request.handle.put(Piece("", finish_reason="length"))
            return
        row = len(self._running)
        if request.row != row:
            self._rows.copy(request.row, row, len(request.window))
        self._running.append(request)
        if self._logits is not None:
            logits = torch.cat((self._logits, logits))
        self._logits = logits
        self._sampler.select(range(row), self._sampler_rows(row + 1))
        self._sampler.add(
            row,
            request.text.constraints,
            SamplingParams.of(request.text.config),
            key=request.text.key,
            history=request.text.ids,
            step=request.text.count,
        )

    # -- running texts ----------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self) -> None:
        """One more token of every running text; several of a single one, where they are guessed."""
        if not self._running:
            return
        began = time.perf_counter()
        assert self._logits is not None
        self._take(self._logits, self._pick(self._logits))
        with self._wake:
            going = [request for request in self._running if not request.text.finished]
            outgrown = [r for r in going if r.text.position >= self._engine.limit]
            for request in outgrown:
                request.text.slide(self._engine.limit)
                self._waiting.appendleft(request)  # its window is read again
            self._keep([request for request in going if request not in outgrown])
            if not self._all_requests():
                self._wake.notify_all()
            alone = len(self._all_requests()) == 1
        if alone and self._running and self._speculate(self._running[0]):
            return
        if self._running:
            last = [request.text.ids[-1] for request in self._running]
            positions = [request.text.position for request in self._running]
            self._logits = self._rows.decode(last, positions)
            self._chunks.note_step(time.perf_counter() - began)

    def _pick(self, logits: Tensor) -> Tensor:
        """The next token of each row of the sampler; changes no state."""
        check_logits(self.generator.model, logits)
        padded = self._pad(logits)
        ids = self._sampler.choose(padded)
        blocked: Tensor | None = None
        while offenders := [
            (row, id_)
            for row, (request, id_) in enumerate(zip(self._running, ids.tolist(), strict=False))
            if request.text.offends(id_)
        ]:
            blocked = torch.zeros_like(padded, dtype=torch.bool) if blocked is None else blocked
            for row, id_ in offenders:
                blocked[row, id_] = True
            ids = self._sampler.choose(padded, blocked=blocked)
        return ids

    def _take(self, logits: Tensor, picked: Tensor) -> None:
        """Hand the picked tokens to the running texts."""
        self._sampler.advance(picked)
        ids: list[int] = picked.tolist()[: len(self._running)]
        infos = wanted_infos(logits, ids, [request.top_logprobs for request in self._running])
        for request, id_, info in zip(self._running, ids, infos, strict=True):
            count = request.text.count
            piece = request.text.put(id_)
            tokens = (info,) if request.text.count > count else ()
            request.handle.put(Piece(piece, tokens, request.text.finish_reason))

    def _speculate(self, request: Request) -> bool:
        """Let the generator's assistant draft tokens of the only text, and check them in one step.

        A drafted token is kept where it is the one that is picked anyway, so the text stays what it
        is. Returns False where nothing could be drafted.
        """
        text, size = request.text, request.text.config.num_assistant_tokens
        if self._draft is None or self._rows.whole or not size:
            return False
        if text.position + size >= self._engine.limit:
            return False
        drafted = self._draft.propose(text.ids[text.start :], size, self._sampler)
        if not drafted:
            return False
        checked = self._rows.read_all(0, [text.ids[-1], *drafted], text.position)  # (1 + size, V)
        for place, id_ in enumerate([*drafted, None]):
            self._logits = checked[place : place + 1]
            # What was not drafted right is picked at the next step, from these logits.
            if id_ is None or text.finished or text.to_come == 1:
                break
            picked = self._pick(self._logits)
            if int(picked[0]) != id_:
                break
            self._take(self._logits, picked)
        return True

    def _keep(self, requests: Sequence[Request]) -> None:
        """Go on with these of the running texts; the last ones move to the rows set free."""
        if len(requests) == len(self._running):
            return
        kept = {id(request) for request in requests}
        rows = [row for row, request in enumerate(self._running) if id(request) in kept]
        order = list(range(len(rows)))
        holes = [row for row in order if row not in rows]
        movers = [row for row in rows if row >= len(rows)]
        for hole, mover in zip(holes, movers, strict=True):
            self._rows.copy(mover, hole, self._running[mover].text.position)
            order[hole] = mover
        self._running = [self._running[row] for row in order]
        if order:
            self._sampler.select(order, self._sampler_rows(len(order)))
            assert self._logits is not None
            self._logits = self._logits[order]
        else:
            self._sampler, self._logits = self._new_sampler(), None

    # -- sizes ------------------------------------------------------------------------------------

    def _sampler_rows(self, running: int) -> int:
        return self._rows.count if self._rows.whole else max(running, 1)

    def _new_sampler(self) -> Sampler:
        return Sampler(
            self._sampler_rows(0),
            vocab_size=self.generator.model.config.vocab_size,
            device=self.generator.model.device,
            per_row=self._engine.on_cuda,
        )

    def _pad(self, logits: Tensor) -> Tensor:
        """(A, V) with a row for every row of the sampler."""
        missing = self._sampler_rows(len(logits)) - len(logits)
        return torch.nn.functional.pad(logits, (0, 0, 0, missing)) if missing else logits
