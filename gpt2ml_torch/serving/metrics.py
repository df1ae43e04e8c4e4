"""Prometheus metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gpt2ml_torch.serving.scheduler import Scheduler

_FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counts what the server does; `render` gives Prometheus's text format."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gpt2ml_requests", "Requests answered", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            "gpt2ml_prompt_tokens", "Prompt tokens of accepted requests", registry=self._registry
        )
        self.cached_tokens = Counter(
            "gpt2ml_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache",
            registry=self._registry,
        )
        self.completion_tokens = Counter(
            "gpt2ml_completion_tokens", "Tokens written", registry=self._registry
        )
        self.first_token = Histogram(
            "gpt2ml_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "gpt2ml_request_seconds",
            "From the request to its last token",
            buckets=(*_FIRST_TOKEN_SECONDS, 120, 300),
            registry=self._registry,
        )
        for name, text, value in (
            ("gpt2ml_running_rows", "Texts being read or written", lambda: scheduler.running),
            ("gpt2ml_queued_texts", "Texts waiting for a row", lambda: scheduler.queued),
            (
                "gpt2ml_cache_tokens",
                "Tokens in the key-value cache",
                lambda: scheduler.cache_tokens,
            ),
            (
                "gpt2ml_prefix_cache_tokens",
                "Tokens in the prefix cache",
                lambda: scheduler.prefix_tokens,
            ),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        return generate_latest(self._registry)
