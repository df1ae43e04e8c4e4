"""Scheduler: continuous batching. Requests join and leave the batch at every step.

A thread runs one loop over a cache of fixed rows. Each turn it reads as much of the waiting prompts
as the running texts may wait for, and then decodes one token of each of these. Running texts fill
the first rows of the cache, so that a step works on those alone. A text is exactly what `Generator`
writes for its prompt, configuration and sample number by itself.
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

from torch import Tensor

from gpt2ml_torch.generation import GenerationConfig, Generator
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.openmp import release_threads
from gpt2ml_torch.serving.chunks import SMALLEST, Pace
from gpt2ml_torch.serving.handle import Handle, Piece, TokenInfo
from gpt2ml_torch.serving.prefixes import PrefixCache
from gpt2ml_torch.serving.reader import PromptReader
from gpt2ml_torch.serving.request import Request
from gpt2ml_torch.serving.rows import RowCache
from gpt2ml_torch.serving.running import RunningTexts

__all__ = ["Handle", "Piece", "QueueFull", "Scheduler", "TokenInfo"]

_logger = logging.getLogger(__name__)

MAX_ROWS = 8
MAX_QUEUE = 64
PREFIX_TOKENS = 1024
HOLD_SECONDS = 4.0  # that a text whose prompt is read waits for others that came with it


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
        self._pace = Pace(generator.engine.limit)
        self._reader = PromptReader(self._rows, self._prefixes, self._pace)
        self._running = RunningTexts(generator, self._rows)
        self._held_since: float | None = None
        self._reading: Request | None = None
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Scheduler:
        """Start the thread that reads and writes; call it from the one that used the model last."""
        if self._thread is None:
            release_threads()
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
        with self._wake:
            writing = sum(not request.text.finished for request in self._running.requests)
            return writing + (self._reading is not None)

    @property
    def queued(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the rows in use hold."""
        reading = self._reading
        held = sum(request.text.position + 1 for request in self._running.requests)
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
        for prompt in prompts:
            if not isinstance(prompt, str):
                self._check_ids(prompt)
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

    def _check_ids(self, ids: Sequence[int]) -> None:
        size = self.generator.model.config.vocab_size
        if not len(ids):
            raise ValueError("the prompt holds no token id; give at least one")
        wrong = next((id_ for id_ in ids if not 0 <= id_ < size), None)
        if wrong is not None:
            raise ValueError(f"the prompt holds token id {wrong}; the model has 0 to {size - 1}")

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
        return [*self._running.requests, *reading, *self._waiting]

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
                if not self._holds_back():
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
        for request in [r for r in self._running.requests if r.cancelled]:
            request.handle.put(Piece("", finish_reason="cancelled"))
        self._running.keep([r for r in self._running.requests if not r.cancelled])

    def _fail(self, error: Exception) -> None:
        """End what is under way; what waits goes on."""
        _logger.warning("texts under way were ended: %s", error)
        with self._wake:
            under_way = [
                *self._running.requests,
                *([] if self._reading is None else [self._reading]),
            ]
            self._running.clear()
            self._reading = None
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

    def _read(self) -> None:
        """Read of the prompts as much as the running texts may wait for."""
        began, spent = time.perf_counter(), 0.0
        while (request := self._reading) is not None:
            held = self._holds_back()
            beside = 0 if held else len(self._running)
            size = self._pace.tokens(running=beside, spent=spent)
            if size < min(len(request.window) - request.read, SMALLEST):
                return
            logits = self._reader.read(request, size, self._running.requests)
            if logits is not None:
                self._begin_writing(request, logits)
            with self._wake:
                self._admit()
            if not beside:
                return  # to look for cancellations first
            spent = time.perf_counter() - began

    def _holds_back(self) -> bool:
        """Whether the texts that have been read wait for the prompts of others that came with them.

        A step with few texts takes as long as one with several, so texts that come together are
        best begun together. No text waits longer than `HOLD_SECONDS` for that, and none that has
        begun.
        """
        running, reading = self._running.requests, self._reading
        if reading is None or not running or any(request.begun for request in running):
            self._held_since = None
            return False
        if self._held_since is None:
            self._held_since = time.monotonic()
        to_read = self._pace.read_seconds(len(reading.window) - reading.read)
        return time.monotonic() + to_read <= self._held_since + HOLD_SECONDS

    def _begin_writing(self, request: Request, logits: Tensor) -> None:
        request.prompt_logprobs = False  # they are there; the window may be read again later
        with self._wake:
            if request.only_read:
                request.handle.put(Piece("", finish_reason="length"))
            else:
                self._running.add(request, logits)
            self._reading = None

    # -- running texts ----------------------------------------------------------------------------

    def _step(self) -> None:
        """One more token of every running text; several of a single one, where they are guessed."""
        if not self._running:
            return
        began = time.perf_counter()
        self._running.choose()
        with self._wake:
            self._drop_ended()
            alone = len(self._all_requests()) == 1
        if not self._running:
            return
        if alone and self._running.speculate():
            with self._wake:
                self._drop_ended()
            return
        self._running.decode()
        self._pace.note_step(len(self._running), time.perf_counter() - began)

    def _drop_ended(self) -> None:
        """Free the rows of the texts that have ended, and of those that have outgrown the window,
        which is read again.
        """
        limit = self._engine.limit
        going = [request for request in self._running.requests if not request.text.finished]
        outgrown = [request for request in going if request.text.position >= limit]
        for request in reversed(outgrown):
            request.text.slide(limit)
            self._waiting.appendleft(request)
        self._running.keep([request for request in going if request not in outgrown])
        if not self._all_requests():
            self._wake.notify_all()
