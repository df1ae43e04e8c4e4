"""A real server process for the tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """`gpt2ml serve` in a process of its own; `url` ends without a slash."""

    def __init__(
        self, model: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "gpt2ml_torch", "serve", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options],
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


@contextlib.contextmanager
def serving(model: Path, *options: str, **settings: dict[str, str]) -> Iterator[ServerProcess]:
    """A server that is killed in the end, if it still runs."""
    server = ServerProcess(model, *options, **settings)
    try:
        yield server
    finally:
        server.kill()
