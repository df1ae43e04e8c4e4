"""Errors as OpenAI's API reports them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request that can't be served; becomes a response of this status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        standard = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, standard),
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, *, param: str | None = None) -> APIError:
    """The error of a request whose content is wrong."""
    return APIError(400, message, param=param, code="invalid_value")


def unavailable() -> APIError:
    """The error of a server that is shutting down."""
    return APIError(503, "the server is shutting down", headers={"Retry-After": "10"})
