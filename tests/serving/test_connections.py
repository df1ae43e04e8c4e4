"""Clients that go, stop reading or send nonsense; a full queue; how a server ends and starts."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest

from tests.helpers.server import (
    PROMPT,
    ServerProcess,
    address,
    ask,
    complete,
    connect,
    post,
    rows_in_use,
    serving,
    wait_until_idle,
)


def count_files(folder: Path) -> int | None:
    """How many files a process has open, by its folder in /proc; None without one."""
    return len(list(folder.iterdir())) if folder.exists() else None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(server: ServerProcess, stream: bool) -> None:
    with connect(server) as sock:
        sock.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": stream}))
        if stream:
            assert sock.recv(100)
        else:
            time.sleep(0.2)
        assert rows_in_use(server) == 1
    wait_until_idle(server)


def test_a_client_that_only_stops_sending_counts_as_gone(server: ServerProcess) -> None:
    with connect(server) as sock:
        sock.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
        assert sock.recv(100)
        sock.shutdown(socket.SHUT_WR)
        wait_until_idle(server)


def test_a_client_that_goes_in_the_middle_of_its_body_is_no_failure(server: ServerProcess) -> None:
    lines = len(server.log)
    with connect(server) as sock:
        sock.sendall(post({"prompt": PROMPT})[:-5])
        time.sleep(0.1)
    assert complete(server, max_tokens=1)
    assert not any("Traceback" in line for line in server.log[lines:])


def test_a_client_that_stops_reading_holds_neither_rows_nor_memory_nor_others(
    shipped_model: Path,
) -> None:
    constants = {"runner.SEND_SECONDS": 1.0, "answers.MAX_UNREAD": 1 << 18}
    with serving(shipped_model, "--max-rows", "4", constants=constants) as server:
        assert complete(server, max_tokens=1)
        files = Path(f"/proc/{server.process.pid}/fd")
        before = len(list(files.iterdir())) if files.exists() else None
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address(server))
            body = {"prompt": PROMPT, "max_tokens": 4000, "stream": True, "logprobs": 20, "n": 4}
            sock.sendall(post(body))
            assert complete(server, max_tokens=4)
            wait_until_idle(server, seconds=60)
            end = time.monotonic() + 10
            while "stopped reading" not in "".join(server.log):
                assert time.monotonic() < end
                time.sleep(0.05)
            after = count_files(files)
            assert before is None or (after is not None and after <= before)
        assert not any("Traceback" in line for line in server.log)


def test_connections_without_a_request_are_closed_and_too_many_refused(
    shipped_model: Path,
) -> None:
    constants = {
        "runner.HEADER_SECONDS": 3,
        "runner.IDLE_SECONDS": 1,
        "guard.BODY_SECONDS": 0.5,
        "runner.MAX_CONNECTIONS": 20,
    }
    with serving(shipped_model, constants=constants) as server, contextlib.ExitStack() as idle:
        assert complete(server, max_tokens=1)
        for _ in range(24):
            idle.enter_context(connect(server))
        status, answer, headers = ask(server, "/health")
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert int(headers["retry-after"]) >= 1
        for _ in range(160):  # one burst more than get an answer
            idle.enter_context(connect(server))
        with pytest.raises((ConnectionError, URLError)):
            ask(server, "/health")
        idle.close()
        time.sleep(0.2)
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        for sent, answered in (
            (b"", b""),
            (get, b""),
            (get + b"\r\n", b" 200 "),
            (post({"prompt": PROMPT})[:-5], b" 408 "),
        ):
            with connect(server) as sock:
                sock.sendall(sent)
                received = b""
                while part := sock.recv(65536):
                    received += part
                assert answered in received
                assert bool(answered) == bool(received)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00" * 40,  # TLS
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_error_of_openais_shape(
    server: ServerProcess, sent: bytes
) -> None:
    with connect(server) as sock:
        sock.sendall(sent)
        received = b""
        while part := sock.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_old_and_pipelined_requests_are_answered(server: ServerProcess) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 " in sock.recv(65536)
    with connect(server) as sock:
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        sock.sendall((get + b"\r\n") * 5 + get + b"Connection: close\r\n\r\n")
        received = b""
        while part := sock.recv(65536):
            received += part
    assert received.count(b" 200 OK") == 6


def test_a_full_queue_answers_429_and_the_others_go_on(shipped_model: Path) -> None:
    with serving(shipped_model, "--max-rows", "1", "--max-queue", "1") as server:
        sockets = [connect(server) for _ in range(2)]
        for sock in sockets:
            sock.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
            time.sleep(0.3)
        status, answer, headers = ask(server, "/v1/completions", {"prompt": PROMPT})
        assert status == 429
        assert answer["error"]["type"] == "rate_limit_error"
        assert int(headers["retry-after"]) >= 1
        for sock in sockets:
            sock.close()
        wait_until_idle(server)
        assert complete(server, max_tokens=2)


def test_sigterm_lets_streams_end_and_turns_new_requests_away(shipped_model: Path) -> None:
    with serving(shipped_model) as server, connect(server) as stream, connect(server) as late:
        stream.sendall(post({"prompt": PROMPT, "max_tokens": 1500, "stream": True}))
        received = stream.recv(200)
        ended: list[int] = []
        ending = threading.Thread(target=lambda: ended.append(server.terminate()))
        ending.start()
        time.sleep(0.3)
        late.sendall(post({"prompt": PROMPT}))
        assert b" 503 " in late.recv(200)
        while part := stream.recv(65536):
            received += part
        assert b"data: [DONE]" in received
        ending.join()
        assert ended == [0]


def test_sigterm_waits_for_streams_no_longer_than_it_was_told(shipped_model: Path) -> None:
    with serving(shipped_model, "--drain-seconds", "0.5") as server, connect(server) as stream:
        stream.sendall(post({"prompt": PROMPT, "max_tokens": 4096, "n": 8, "stream": True}))
        assert stream.recv(100)
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 8
        received = b""
        while part := stream.recv(65536):
            received += part
        assert b"the server is shutting down" in received
        assert not any("Traceback" in line for line in server.log)


def test_a_server_killed_while_streaming_starts_again_on_its_port(shipped_model: Path) -> None:
    port = "0"
    for _ in range(2):
        with serving(shipped_model, "--port", port) as server, connect(server) as stream:
            stream.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
            assert stream.recv(100)
            server.kill()
            port = str(urlsplit(server.url).port)


def test_a_port_in_use_is_one_line(server: ServerProcess, shipped_model: Path) -> None:
    port = urlsplit(server.url).port
    from gpt2ml_torch.__main__ import main

    assert main(["serve", str(shipped_model), "--port", str(port)]) == 2
