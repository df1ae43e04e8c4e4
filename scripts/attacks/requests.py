"""Hostile requests to a server: errors have the documented form, other clients' texts are right."""

from __future__ import annotations

import http.client
import json
import random
import socket
from pathlib import Path
from typing import Any

from scripts.attacks.tools import ServedModel, any_json, damaged, write_model

FIELDS = (
    *(
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "stream",
        "seed",
        "echo",
    ),
    *(
        "logprobs",
        "logit_bias",
        "presence_penalty",
        "min_tokens",
        "stream_options",
        "user",
        "model",
    ),
)


class Attack:
    def __init__(self, folder: Path) -> None:
        self._served = ServedModel(write_model(folder / "m.safetensors"), "--name", "m")
        self._expected = self._known()

    def close(self) -> None:
        self._served.close()

    def __call__(self, draw: random.Random) -> None:
        kind = draw.randrange(4)
        if kind == 0:
            self._send_anything(draw)
        elif kind == 1:
            self._go_away(draw)
        else:
            body = {name: any_json(draw) for name in draw.sample(FIELDS, draw.randint(1, 4))}
            if draw.random() < 0.7:
                body["prompt"] = "今天"
            if draw.random() < 0.5:
                body["max_tokens"] = 3
            status, answer = self._post(json.dumps(body).encode())
            assert status in (200, 400, 404), f"{body}: {status} {answer!r}"
            if status != 200:
                assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        assert self._served.process.poll() is None, "the server ended"
        assert self._known() == self._expected, "another text is written now"

    def _known(self) -> Any:
        body = {"prompt": "今天", "seed": 1, "max_tokens": 5}
        status, answer = self._post(json.dumps(body).encode())
        assert status == 200, answer
        return json.loads(answer)["choices"]

    def _post(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._served.port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _raw(self, body: bytes) -> bytes:
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

    def _send_anything(self, draw: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self._served.port), timeout=120) as sock:
            sock.sendall(damaged(draw, self._raw(b'{"prompt": "\\u4eca\\u5929", "max_tokens": 2}')))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    def _go_away(self, draw: random.Random) -> None:
        body = {"prompt": "今天", "max_tokens": 2000, "stream": draw.random() < 0.5}
        with socket.create_connection(("127.0.0.1", self._served.port), timeout=120) as sock:
            sock.sendall(self._raw(json.dumps(body).encode()))
            if draw.random() < 0.5:
                sock.recv(draw.choice((1, 100, 10_000)))
