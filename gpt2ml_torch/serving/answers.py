"""The answer to a completions request: whole, or as a stream of events.

A client that reads slowly holds nothing back: its texts are written at full speed, and what it has
not read yet waits here, up to `MAX_UNREAD` bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gpt2ml_torch.serving.completions import CompletionRequest
from gpt2ml_torch.serving.errors import APIError, unavailable
from gpt2ml_torch.serving.handle import Handle
from gpt2ml_torch.serving.metrics import Metrics
from gpt2ml_torch.serving.responses import (
    LAST_EVENT,
    Choice,
    Envelope,
    encode_event,
    join,
    usage_of,
)
from gpt2ml_torch.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

MAX_UNREAD = 4 << 20  # bytes of a stream that its client has not read; then it is ended


class SlowReader(Exception):
    """A client lets too much of its stream wait."""


@dataclasses.dataclass(frozen=True)
class _Text:
    handle: Handle
    choice: Choice


class Answer:
    """The texts of one request on their way to the client."""

    def __init__(
        self,
        wanted: CompletionRequest,
        handles: Sequence[Handle],
        *,
        tokenizer: Tokenizer,
        model: str,
        metrics: Metrics,
        began: float,
    ) -> None:
        self._wanted, self._metrics, self._began = wanted, metrics, began
        self._envelope = Envelope(model)
        self._texts = [
            _Text(handle, Choice(index, wanted, tokenizer, handle.prompt))
            for index, handle in enumerate(handles)
        ]
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._unread = 0  # bytes in the queue

    def cancel(self) -> None:
        """Free the rows; does nothing to texts that have ended."""
        for text in self._texts:
            text.handle.cancel()

    # -- whole ------------------------------------------------------------------------------------

    async def whole(self, request: Request) -> dict[str, Any]:
        """The response in JSON; raises `APIError` where the client goes away meanwhile."""

        async def collect(text: _Text) -> dict[str, Any]:
            return join([part async for part in self._parts(text)])

        work: asyncio.Future[Any] = asyncio.gather(*map(collect, self._texts))
        gone: asyncio.Future[Any] = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise APIError(499, "the client went away")
            choices = work.result()
        except ValueError as error:  # the model's, such as logits that overflow
            raise APIError(500, str(error)) from None
        finally:
            self.cancel()
            await _end(work, gone)
        self._note_duration()
        return self._envelope.whole(choices, self._usage())

    async def _parts(self, text: _Text) -> AsyncIterator[dict[str, Any]]:
        """One text, part by part, in JSON."""
        choice, first = text.choice, True
        async for piece in text.handle:
            if piece.finish_reason == "cancelled":  # not by the client, which still listens
                raise unavailable()
            if first and self._wanted.echo:
                part = choice.echo(text.handle.prompt_tokens)
                if self._wanted.max_tokens == 0:
                    part["finish_reason"] = "length"
                yield part
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._began)
                self._metrics.cached_tokens.inc(text.handle.cached_tokens)
            first = False
            self._metrics.completion_tokens.inc(len(piece.tokens))
            if self._wanted.max_tokens:
                yield choice.put(piece)

    def _usage(self) -> dict[str, Any]:
        prompts = {text.choice.index // self._wanted.n: text.handle for text in self._texts}
        return usage_of(
            sum(len(handle.prompt_ids) for handle in prompts.values()),
            sum(text.choice.tokens for text in self._texts),
            sum(handle.cached_tokens for handle in prompts.values()),
        )

    def _note_duration(self) -> None:
        self._metrics.duration.observe(time.perf_counter() - self._began)

    # -- as a stream ------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, of all texts as they come."""
        feeding = [asyncio.create_task(self._feed(text)) for text in self._texts]
        try:
            open_texts = len(self._texts)
            while open_texts:
                item = await self._queue.get()
                if item is None:
                    open_texts -= 1
                elif isinstance(item, bytes):
                    self._unread -= len(item)
                    yield item
                else:
                    yield encode_event(_as_error(item).body())
                    return
            if self._wanted.include_usage:
                yield self._envelope.event([], usage=self._usage())
            yield LAST_EVENT
            self._note_duration()
        finally:
            for task in feeding:
                task.cancel()

    async def _feed(self, text: _Text) -> None:
        extra = {"usage": None} if self._wanted.include_usage else {}
        try:
            async for part in self._parts(text):
                if part["text"] or part["finish_reason"] or part["logprobs"]:
                    self._put(self._envelope.event([part], **extra))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    def _put(self, event: bytes) -> None:
        self._unread += len(event)
        if self._unread > MAX_UNREAD:
            self.cancel()
            while not self._queue.empty():  # nobody reads it
                self._queue.get_nowait()
            raise SlowReader("the stream was ended: its client reads too slowly")
        self._queue.put_nowait(event)


class EventStream(Response):
    """Server-sent events; ends the texts when the client goes."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.create_task(_disconnected(Request(scope, receive)))
        writing = asyncio.create_task(self._write(send))
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._answer.cancel()
            await _end(gone, writing)

    async def _write(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._answer.events()) as events:  # type: ignore[type-var]
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _as_error(error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if not isinstance(error, (ValueError, SlowReader)):
        _logger.error("a stream failed", exc_info=error)
    return APIError(500, str(error))


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
