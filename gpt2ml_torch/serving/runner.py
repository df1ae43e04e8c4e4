"""Runs the application with uvicorn: time limits that uvicorn lacks, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
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
from gpt2ml_torch.serving.scheduler import Scheduler

HEADER_SECONDS = 10.0  # from a connection, or its next request's first byte, to the end of headers
IDLE_SECONDS = 30  # that a connection may wait for its next request
HEADER_BYTES = 16 << 10
MAX_CONNECTIONS = 1024


class TimedProtocol(H11Protocol):
    """Closes connections that do not send their headers in time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._start_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT new requests get 503 while running ones end, for a bounded
    time; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._server = server
        self._drain_seconds = drain_seconds

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
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `OSError` in words where the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        raise OSError(error.errno, f"can't listen on {host}:{port}: {error.strerror}") from None
    made.listen(128)
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
    scheduler = Scheduler(
        generator,
        max_rows=config.max_rows,
        max_memory=None if config.max_memory is None else int(config.max_memory * 2**30),
        max_queue=config.max_queue,
        prefix_tokens=config.prefix_cache_tokens,
    )
    limits = Limits(
        max_tokens=config.max_tokens,
        max_samples=config.max_samples,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    server = Server(
        scheduler,
        name=name,
        limits=limits,
        api_keys=api_keys,
        hosts=(config.host, *config.allowed_host),
        log_prompts=config.log_prompts,
    )
    with scheduler, contextlib.suppress(KeyboardInterrupt):
        uvicorn_config = uvicorn.Config(
            server.application,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=HEADER_BYTES,
            limit_concurrency=MAX_CONNECTIONS,
        )
        DrainingServer(uvicorn_config, server, drain_seconds=config.drain_seconds).run(
            sockets=[sock]
        )
