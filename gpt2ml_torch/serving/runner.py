"""Runs the application with uvicorn: time limits that uvicorn lacks, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2ml_torch.generation import Generator
from gpt2ml_torch.serving.app import Server
from gpt2ml_torch.serving.completions import Limits
from gpt2ml_torch.serving.config import ServeConfig
from gpt2ml_torch.serving.errors import invalid
from gpt2ml_torch.serving.guard import HEADER_BYTES
from gpt2ml_torch.serving.scheduler import Scheduler

_logger = logging.getLogger(__name__)

HEADER_SECONDS = 10.0  # from a connection, or its next request's first byte, to the end of headers
SEND_SECONDS = 60.0  # a client that takes nothing of what was sent for so long is gone
END_SECONDS = 2.0  # for the last words to clients whose texts were cut short
MAX_CONNECTIONS = 1024  # more get 503, and many more are closed unheard
BACKLOG = 128  # connections accepted in one go, before any of them is counted
SPARE_FILES = 2 * BACKLOG + 64
IDLE_SECONDS = 30  # that a connection may wait for its next request


class TimedProtocol(H11Protocol):
    """Closes connections that do not send their headers, or do not read, in time, and those beyond
    `max_connections` and as many as come in one go.
    """

    def __init__(self, *arguments: Any, max_connections: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._max_connections = max_connections
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections + BACKLOG:
            transport.abort()
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._start_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to; a while without progress is too much."""
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_send_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape that all errors have."""
        body = json.dumps(invalid(msg).body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # the request was answered before
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _abort_later(self) -> None:
        if self._send_timer is None and self.transport.get_write_buffer_size():
            self._send_timer = self.loop.call_later(SEND_SECONDS, self._abort)

    def _abort(self) -> None:
        """Close without waiting for what the client does not read."""
        _logger.info("a client stopped reading its response")
        self.transport.abort()

    def _close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
            self._abort_later()


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT new requests get 503 while running ones end, for a bounded
    time; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._server = server
        self._drain_seconds = drain_seconds
        server.count_connections = lambda: len(self.server_state.connections)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.draining:
            super().handle_exit(sig, frame)
            return
        self._server.draining = True  # an orderly end: the signal is not raised again afterwards
        asyncio.get_event_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._wait_for_requests())

    async def _wait_for_requests(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        while self._server.active and loop.time() < end:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._server.scheduler.close)  # ends what still runs
        end = loop.time() + END_SECONDS
        while self._server.active and loop.time() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def allow_connections() -> int:
    """How many connections the process may hold, after asking for enough open files.

    A process that is out of files can't even refuse a connection: asyncio would fill the log.
    """
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if 0 <= soft < wanted:
        raised = wanted if hard < 0 else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return MAX_CONNECTIONS if soft < 0 else min(MAX_CONNECTIONS, max(soft - SPARE_FILES, soft // 4))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `OSError` in words where the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        raise OSError(error.errno, f"can't listen on {host}:{port}: {error.strerror}") from None
    made.listen(BACKLOG)
    return made


def serve(
    generator: Generator,
    sock: socket.socket,
    config: ServeConfig,
    *,
    name: str,
    api_keys: tuple[str, ...] = (),
    log_level: str = "info",
) -> None:
    """Answer requests on a listening socket until a signal comes."""
    scheduler = _scheduler(generator, config)
    max_connections = allow_connections()
    server = Server(
        scheduler,
        name=name,
        limits=_limits(config),
        api_keys=api_keys,
        hosts=(config.host, *config.allowed_host),
        log_prompts=config.log_prompts,
        max_connections=max_connections,
    )
    with scheduler, contextlib.suppress(KeyboardInterrupt):
        uvicorn_config = uvicorn.Config(
            server.application,
            http=functools.partial(TimedProtocol, max_connections=max_connections),  # type: ignore[arg-type]
            backlog=BACKLOG,
            ws="none",
            lifespan="off",
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        running = DrainingServer(uvicorn_config, server, drain_seconds=config.drain_seconds)
        running.run(sockets=[sock])


def _scheduler(generator: Generator, config: ServeConfig) -> Scheduler:
    return Scheduler(
        generator,
        max_rows=config.max_rows,
        max_memory=None if config.max_memory is None else int(config.max_memory * 2**30),
        max_queue=config.max_queue,
        prefix_tokens=config.prefix_cache_tokens,
    )


def _limits(config: ServeConfig) -> Limits:
    return Limits(
        max_tokens=config.max_tokens,
        max_samples=config.max_samples,
        max_prompt_tokens=config.max_prompt_tokens,
    )
