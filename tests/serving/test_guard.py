"""Who may ask: names that a Host header may and may not hold, and keys."""

from __future__ import annotations

import pytest

from gpt2ml_torch.serving.config import ServeConfig

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from gpt2ml_torch.serving.guard import Guard, host_name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:8000", "localhost"),
        ("LOCALHOST.", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("localhost.evil.example", "localhost.evil.example"),
        ("user@localhost", ""),
        ("localhost/evil", ""),
        ("evil#localhost", ""),
        ("localhost:port", ""),
        ("[::1", ""),
        ("[::1]x", ""),
        ("", ""),
    ],
)
def test_a_host_header_names_one_host_or_none(header: str, name: str) -> None:
    assert host_name(header) == name


def test_a_server_on_an_ipv6_address_takes_no_empty_host() -> None:
    guard = Guard(None, api_keys=(), hosts=("::1", ""), respond=lambda error: error)
    assert "" not in guard._hosts


@pytest.mark.parametrize("key", ["", " ", "a b ", "\n", "a\x00"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key is empty"):
        ServeConfig(api_key=(key,))
