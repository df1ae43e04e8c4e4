"""The benchmark's clients count what a real server sends."""

from __future__ import annotations

import asyncio

import pytest

from scripts.benchmarks.load import NEW_TOKENS, Server, measure
from scripts.benchmarks.serving import table
from tests.helpers.server import ServerProcess


def test_clients_in_closed_loop_count_every_token_once(server: ServerProcess) -> None:
    peer = Server("ours", (f"{server.url}/v1",), {"min_tokens": NEW_TOKENS})
    found = asyncio.run(measure(peer, clients=2, seconds=3.0))
    tokens = round(found["tokens_per_second"] * 3.0)
    assert found["texts"] >= 2
    # Two texts may be unfinished; an event of a token that shows nothing may be missing.
    assert 0.8 * found["texts"] * NEW_TOKENS <= tokens <= (found["texts"] + 2) * NEW_TOKENS * 1.1
    assert 0 < found["first_token_median"] <= found["first_token_p99"] < 3.0


def test_an_error_of_a_server_is_raised(server: ServerProcess) -> None:
    peer = Server("ours", (f"{server.url}/v1",), {"nonsense": 1})
    with pytest.raises(RuntimeError, match="nonsense"):
        asyncio.run(measure(peer, clients=2, seconds=3.0))


def test_the_table_compares_each_server_with_ours() -> None:
    row = {"clients": 8, "first_token_median": 1.0, "first_token_p99": 2.0}
    machine = {"date": "today", "processor": "a CPU", "cores": 2, "torch": "2"}
    result = {
        "machine": machine,
        "size": "mega",
        "precision": "int8",
        "vllm_dtype": "float32",
        "batches": {"8": 50.0},
        "rows": [
            row | {"who": "ours", "tokens_per_second": 45.0},
            row | {"who": "llama.cpp", "tokens_per_second": 15.0},
        ],
        "absent": {"vLLM": "it is not installed"},
    }
    lines = table(result)
    assert "| 8 | `Generator`, one batch | 50.0 | 0.90 × |" in lines
    assert "| 8 | llama.cpp | 15.0 | 3.0 × | 1.00 | 2.00 |" in lines
    assert "vLLM was not measured: it is not installed" in lines
