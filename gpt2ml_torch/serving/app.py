"""The HTTP application: OpenAI's completions endpoint, some of our own, and the page."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from gpt2ml_torch.serving.answers import Answer, EventStream
from gpt2ml_torch.serving.completions import CompletionRequest, Limits, parse_request
from gpt2ml_torch.serving.errors import APIError, invalid, unavailable
from gpt2ml_torch.serving.guard import Guard, read_json
from gpt2ml_torch.serving.metrics import Metrics
from gpt2ml_torch.serving.scheduler import Handle, QueueFull, Scheduler

_logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PATHS = ("/", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics")
_MEDIA = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text, status, headers=headers, media_type="application/json")


def error_response(error: APIError) -> Response:
    return json_response(error.body(), error.status, error.headers)


class Server:
    """The endpoints over one `Scheduler`. `application` is the ASGI application."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        name: str,
        limits: Limits | None = None,
        api_keys: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
        log_prompts: bool = False,
        max_connections: int = 1024,
    ) -> None:
        self.scheduler = scheduler
        self.name = name
        self.limits = limits or Limits()
        self.metrics = Metrics(scheduler)
        self.draining = False
        self.active = 0  # requests being answered
        self.count_connections: Callable[[], int] = lambda: self.active
        self._created = int(time.time())
        self._log_prompts = log_prompts
        self._max_connections = max_connections
        self._generator = scheduler.generator
        self.application = self._counted(
            Starlette(
                routes=self._routes(),
                middleware=[
                    Middleware(Guard, api_keys=api_keys, hosts=hosts, respond=error_response)
                ],
                exception_handlers={
                    APIError: lambda _, error: error_response(error),
                    HTTPException: _http_error,
                    Exception: _internal_error,
                },
            )
        )

    def _counted(self, application: Any) -> Any:
        """The application, with its requests under way and their outcomes counted."""

        async def count(scope: Any, receive: Any, send: Any) -> None:
            status = 500

            async def note(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            self.active += 1
            busy = self.count_connections() > self._max_connections
            try:
                await (self._too_many if busy else application)(scope, receive, note)
            finally:
                self.active -= 1
                path = scope.get("path", "")
                known = path if path in _PATHS else "other"
                self.metrics.requests.labels(known, str(status)).inc()

        return count

    async def _too_many(self, scope: Any, receive: Any, send: Any) -> None:
        error = APIError(
            503,
            f"more than {self._max_connections} connections are open",
            code="too_many_connections",
            headers={"Retry-After": "5", "Connection": "close"},
        )
        await error_response(error)(scope, receive, send)

    def _routes(self) -> list[Route]:
        return [
            Route("/", self._file("index.html")),
            Route("/page.js", self._file("page.js")),
            Route("/page.css", self._file("page.css")),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    def _file(self, name: str) -> Any:
        async def serve(_: Request) -> Response:
            path = PAGE / name
            return FileResponse(path, headers=_PAGE_HEADERS, media_type=_MEDIA[path.suffix])

        return serve

    # -- small endpoints --------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        if self.draining:
            raise unavailable()
        return json_response({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        names = [self.name, *self._generator.engine.adapters.names]
        return json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._adapter_of(name)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it; an adapter's `parent` is what it is added to, as in vLLM."""
        parent = {} if name == self.name else {"parent": self.name}
        return {
            "id": name,
            **parent,
            "object": "model",
            "created": self._created,
            "owned_by": "gpt2ml",
            "max_model_len": self._generator.model.config.max_position_embeddings,
        }

    async def chat(self, _: Request) -> Response:
        raise invalid(
            "GPT2_ML is a base model without a chat template; send the text to be continued to "
            "/v1/completions"
        )

    async def embeddings(self, _: Request) -> Response:
        raise APIError(404, "this server has no embeddings; it has /v1/completions")

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, {"model", "prompt"})
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise invalid("prompt is not a string", param="prompt")
        ids = await asyncio.to_thread(self._generator.tokenizer.encode, prompt)
        names = [self._generator.tokenizer.id_to_token(id_) for id_ in ids]
        limit = self._generator.model.config.max_position_embeddings
        return json_response(
            {"tokens": ids, "token_strs": names, "count": len(ids), "max_model_len": limit}
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, {"model", "tokens"})
        ids, size = body.get("tokens"), self._generator.tokenizer.num_embeddings
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise invalid(f"tokens is not a list of ids from 0 to {size - 1}", param="tokens")
        text = await asyncio.to_thread(self._generator.tokenizer.decode, ids)
        return json_response({"prompt": text})

    async def _body(self, request: Request, names: set[str]) -> dict[str, Any]:
        body = await read_json(request, limit=self.limits.max_body)
        if not isinstance(body, dict) or not set(body) <= names:
            raise invalid(f"expected a JSON object with {' and '.join(sorted(names))}")
        return body

    # -- completions ------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        if self.draining:
            raise unavailable()
        began = time.perf_counter()
        body = await read_json(request, limit=self.limits.max_body)
        generator = self._generator
        wanted = await asyncio.to_thread(
            parse_request,
            body,
            limits=self.limits,
            tokenizer=generator.tokenizer,
            vocab_size=generator.model.config.vocab_size,
            defaults=generator.defaults,
        )
        adapter = self._adapter_of(wanted.model)
        wanted = dataclasses.replace(wanted, config=wanted.config.replace(adapter=adapter))
        handles = await asyncio.to_thread(self._submit, wanted)  # it splits prompts into tokens
        self._note(handles)
        answer = Answer(
            wanted,
            handles,
            tokenizer=generator.tokenizer,
            model=adapter or self.name,
            metrics=self.metrics,
            began=began,
        )
        if wanted.stream:
            return EventStream(answer)
        return json_response(await answer.whole(request))

    def _submit(self, wanted: CompletionRequest) -> list[Handle]:
        """All texts of a request, or none."""
        asked = [(prompt, sample) for prompt in wanted.prompts for sample in range(wanted.n)]
        try:
            return self.scheduler.submit_many(
                [prompt for prompt, _ in asked],
                wanted.config,
                samples=[sample for _, sample in asked],
                top_logprobs=wanted.logprobs,
                prompt_logprobs=wanted.echo and wanted.logprobs is not None,
                only_read=wanted.max_tokens == 0,
            )
        except QueueFull as error:
            raise APIError(
                429, str(error), code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except ValueError as error:
            raise invalid(str(error)) from None

    def _note(self, handles: Sequence[Handle]) -> None:
        self.metrics.prompt_tokens.inc(sum(len(handle.prompt_ids) for handle in handles))
        if self._log_prompts:
            _logger.info("prompts: %s", json.dumps([handle.prompt for handle in handles]))

    def _adapter_of(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for, None for the model itself."""
        if model is None or model == self.name:
            return None
        adapters = self._generator.engine.adapters.names
        if model in adapters:
            return model
        raise APIError(
            404,
            f"the model {model[:80]!r} is not served; this server has "
            f"{', '.join(map(repr, (self.name, *adapters)))}",
            param="model",
            code="model_not_found",
        )


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "no such path", 405: "this path takes another method"}
    message = known.get(error.status_code, str(error.detail))
    return error_response(APIError(error.status_code, message, headers=error.headers))


async def _internal_error(_: Request, error: Exception) -> Response:
    _logger.error("a request failed", exc_info=error)
    return error_response(APIError(500, "the server failed; its log says why"))
