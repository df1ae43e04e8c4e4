"""A real server process for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "春眠不觉晓"


class ServerProcess:
    """`gpt2ml serve` in a process of its own; `url` ends without a slash.

    `constants` changes constants of the modules of `gpt2ml_torch.serving`, such as
    `{"runner.SEND_SECONDS": 1}`, to which no option leads.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        constants: dict[str, float] | None = None,
    ) -> None:
        for name in ("starlette", "uvicorn", "prometheus_client"):
            pytest.importorskip(name, reason="the extra `serve` is not installed")
        module = ["-m", "gpt2ml_torch"] if constants is None else ["-c", _start_with(constants)]
        port = [] if "--port" in options else ["--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, *module, "serve", str(model), *port, *options],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._ready = threading.Event()
        self.url = ""
        threading.Thread(target=self._read_log, daemon=True).start()
        assert self._ready.wait(120), "".join(self.log)
        assert self.url, "".join(self.log)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"listening on (http://\S+)/", line)
            if found:
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def terminate(self, *, timeout: float = 30) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)


def _start_with(constants: dict[str, float]) -> str:
    names = ", ".join(sorted({name.partition(".")[0] for name in constants}))
    changes = "; ".join(f"{name} = {value!r}" for name, value in constants.items())
    return (
        f"import sys; from gpt2ml_torch.serving import {names}; {changes}; "
        "from gpt2ml_torch.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )


@contextlib.contextmanager
def serving(model: Path, *options: str, **settings: Any) -> Iterator[ServerProcess]:
    """A server that is killed in the end, if it still runs."""
    server = ServerProcess(model, *options, **settings)
    try:
        yield server
    finally:
        server.kill()


# -- requests --------------------------------------------------------------------------------------


def ask(
    server: ServerProcess,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 60,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of a response; `body` bytes are sent as they are."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    request = Request(server.url + path, data=data, headers=given)
    try:
        with urlopen(request, timeout=timeout) as response:
            text, status, found = response.read(), response.status, dict(response.headers)
    except HTTPError as error:
        text, status, found = error.read(), error.code, dict(error.headers)
    kind = found.get("content-type", "")
    return status, json.loads(text) if "json" in kind else text.decode(), found


def complete(server: ServerProcess, **body: Any) -> Any:
    status, answer, _ = ask(server, "/v1/completions", {"prompt": PROMPT, **body})
    assert status == 200, answer
    return answer


def address(server: ServerProcess) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.port is not None
    return parts.hostname or "", parts.port


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(address(server), timeout=30)


def post(body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + data


def rows_in_use(server: ServerProcess) -> float:
    text = ask(server, "/metrics")[1]
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("gpt2ml_running_rows ", "gpt2ml_queued_texts "))
    )


def wait_until_idle(server: ServerProcess, *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while rows_in_use(server):
        assert time.monotonic() < end, "a row was not freed"
        time.sleep(0.05)
