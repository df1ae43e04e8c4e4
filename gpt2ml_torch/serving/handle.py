"""The caller's side of a request: pieces of text as they are written, from threads and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """A token with its natural log-probability and the most probable ones in its place.

    `logprob` is None where nothing predicts the token: the first of a prompt.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """The text that one step added; the last piece has the reason to stop.

    `text` may be empty while a character is uncertain. `tokens` holds the step's tokens where
    log-probabilities were asked for, and their ids in any case.
    """

    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: str | None = None


class Handle:
    """One text under way. Iterate it, with `for` or `async for`, once; or ask for `result()`.

    An error of the scheduler, such as logits that overflow, is raised in the iteration.
    """

    def __init__(self, prompt: str, prompt_ids: Sequence[int], cancel: Callable[[], None]) -> None:
        self.prompt = prompt
        self.prompt_ids = tuple(prompt_ids)
        self.prompt_tokens: tuple[TokenInfo, ...] = ()  # with log-probabilities, if asked for
        self.cached_tokens = 0  # of the prompt, found in the prefix cache
        self._cancel = cancel
        self._pieces: deque[Piece | Exception] = deque()
        self._arrived = threading.Condition()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Stop writing; the row is free at the next step. Does nothing once the text has ended."""
        self._cancel()

    def result(self, timeout: float | None = None) -> str:
        """The whole continuation; raises `TimeoutError` after `timeout` seconds without a piece."""
        return "".join(piece.text for piece in self._iterate(timeout))

    def __iter__(self) -> Iterator[Piece]:
        return self._iterate(None)

    def _iterate(self, timeout: float | None) -> Iterator[Piece]:
        ended = False
        while not ended:
            with self._arrived:
                if not self._arrived.wait_for(lambda: self._pieces, timeout):
                    raise TimeoutError(f"no piece came in {timeout} s")
                piece = self._pieces.popleft()
            if isinstance(piece, Exception):
                raise piece
            ended = piece.finish_reason is not None
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        event = asyncio.Event()
        with self._arrived:
            self._listener = asyncio.get_running_loop(), event
            if self._pieces:
                event.set()
        ended = False
        while not ended:
            await event.wait()  # it may be set again for pieces that were taken already
            event.clear()
            with self._arrived:
                pieces = list(self._pieces)
                self._pieces.clear()
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                ended = piece.finish_reason is not None
                yield piece

    def put(self, piece: Piece | Exception) -> None:
        """Called by the scheduler."""
        with self._arrived:
            self._pieces.append(piece)
            self._arrived.notify_all()
            if self._listener is not None:
                loop, event = self._listener
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(event.set)
