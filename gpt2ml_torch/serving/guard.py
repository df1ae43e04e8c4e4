"""Who may ask: the API key, the Host header, the origin, and how long a body may take and be.

A page on another site can make a browser send requests to this server (CSRF, and DNS rebinding,
where a foreign name resolves to this machine). So the Host must be a name of this server, an
Origin must be the server's own, and bodies must be declared as JSON, which no foreign page may do
without CORS, which is off.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from gpt2ml_torch.serving.errors import APIError, invalid

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/page.js", "/page.css", "/health")  # need no key
BODY_SECONDS = 30.0
HEADER_BYTES = 16 << 10  # of the request line and all headers
DISCARDED = 64 << 20  # bytes of a body that is too large, read all the same
_HOST = re.compile(r"(\[[0-9a-f:.%]+\]|[^\[\]:/?#@\s]+)(:[0-9]*)?", re.IGNORECASE)


class Guard:
    """ASGI middleware that answers what may not pass."""

    def __init__(
        self,
        app: Any,
        *,
        api_keys: tuple[str, ...],
        hosts: tuple[str, ...],
        respond: Callable[[APIError], Any],
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        names = {host_name(host) for host in (*hosts, "localhost", socket.gethostname())}
        self._hosts = names - {""}
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        try:
            _check_size(scope)
            self._check_host(headers.get("host"))
            self._check_origin(headers)
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get("authorization", b""))
        except APIError as error:
            return await self._respond(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _check_host(self, value: bytes | None) -> None:
        if value is None:  # HTTP/1.0, which no browser speaks
            return
        host = host_name(value.decode("latin-1"))
        if host not in self._hosts and not _is_address(host):
            raise APIError(
                421, "the Host header names another server; see --allowed-host", code="wrong_host"
            )

    def _check_origin(self, headers: MutableMapping[str, bytes]) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        _, _, site = origin.decode("latin-1").lower().partition("://")
        if not site or site != headers.get("host", b"").decode("latin-1").lower():
            raise APIError(
                403, "requests from pages of other sites are refused", code="wrong_origin"
            )

    def _check_key(self, value: bytes) -> None:
        if not self._keys:
            return
        scheme, _, key = value.partition(b" ")
        known = [hmac.compare_digest(key.strip(), expected) for expected in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            raise APIError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _check_size(scope: Scope) -> None:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > HEADER_BYTES:
        raise APIError(
            431,
            f"the headers are larger than {HEADER_BYTES} bytes",
            code="headers_too_large",
            headers={"Connection": "close"},
        )


def host_name(host: str) -> str:
    """The name in a Host header, without its port; empty where the header is malformed."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower().removesuffix(".") if found else ""


def _is_address(host: str) -> bool:
    """Whether it is an IP address, which no DNS answer can redirect."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def read_json(request: Any, *, limit: int) -> Any:
    """The request's body as JSON, of at most `limit` bytes; raises `APIError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _unsupported(
            f"the body is {kind[:60] or 'of no type'}; send Content-Type: application/json"
        )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise _unsupported(f"the body is in the encoding {coding[:60]}; send it as it is")
    body = bytearray()
    try:
        await asyncio.wait_for(_read_body(request, body, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise APIError(
            408, f"the body took more than {BODY_SECONDS:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise APIError(499, "the client went away") from None
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None


async def _read_body(request: Any, body: bytearray, limit: int) -> None:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            body += part
        elif size > limit + DISCARDED:
            break
    if size > limit:  # answered after reading on for a while: most clients send before they listen
        raise APIError(
            413,
            f"the body is larger than {limit} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _unsupported(message: str) -> APIError:
    return APIError(415, message, code="unsupported_media_type", headers={"Connection": "close"})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
