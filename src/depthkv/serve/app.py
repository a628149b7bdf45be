"""The HTTP of the embedded server: OpenAI's completions, chat completions and models, health, metrics, a page."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from depthkv.errors import DepthKVError, ServerBusyError, ServerStoppedError
from depthkv.serve import schema
from depthkv.serve.engine import Engine
from depthkv.serve.guard import Guard, error
from depthkv.serve.request import Failure, Progress, Request

_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/playground.js": "playground.js", "/playground.css": "playground.css"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}

_ANSWERS = _ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "A stream, where it was asked for."}}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, **more: str | None) -> None:
        super().__init__(message)
        self.response = error(status, message, "server_error" if status >= 500 else "invalid_request_error", **more)


def create_app(
    engine: Engine,
    *,
    name: str,
    api_key: str | None = None,
    max_tokens: int = 512,
    max_body: int = 1 << 20,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The application around a running engine, which its shutdown stops.

    Args:
        engine: answers.
        name: of the model, as clients say it.
        api_key: that clients must send; None asks for none.
        max_tokens: most that one request may write, and what it gets that does not say.
        max_body: most bytes of a request's body.
        hosts: names by which the server may be called, so that no foreign page reaches it by a name of its own; None
            takes any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(title="depthkv", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, api_key=api_key, max_body=max_body)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _handle_errors(app)
    _add_files(app)
    card = schema.ModelCard(
        id=name,
        created=schema.new_id("")[1],
        num_layers=engine.num_layers,
        min_retention=engine.depths.min_retention,
        max_retention=engine.depths.max_retention,
        default_retention=engine.depths.default,
        adaptive=engine.is_adaptive,
        max_context=engine.settings.max_context,
        max_tokens=max_tokens,
        chat=engine.codec.chats,
    )

    def most(prompt: Sequence[int]) -> tuple[int, int]:
        """Tokens that a request may ask for, and those that it gets which does not say."""
        room = max(1, min(max_tokens, engine.settings.max_context - len(prompt)))
        return max_tokens, engine.depths.most_tokens(len(prompt), room, engine.settings.kv_budget)

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        if not engine.is_alive:
            raise ApiError(503, "expected a running engine, got one that ended")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", response_model=schema.ModelList, responses={401: _ERRORS[401]})
    async def models() -> schema.ModelList:
        return schema.ModelList(data=[card])

    @app.post("/v1/completions", response_model=schema.Completion, responses=_ANSWERS)
    async def completions(body: schema.CompletionBody, http: HttpRequest) -> Any:
        _require_model(body, name)
        given = body.prompt
        prompt = await run_in_threadpool(engine.codec.encode, given) if isinstance(given, str) else given
        request = _request(body, prompt, body.max_tokens, most(prompt))
        return await _answer(engine, request, body, http, _Completions(name, request, engine.num_layers))

    @app.post("/v1/chat/completions", response_model=schema.ChatCompletion, responses=_ANSWERS)
    async def chat(body: schema.ChatBody, http: HttpRequest) -> Any:
        _require_model(body, name)
        messages = [message.to_template() for message in body.messages]
        prompt = await run_in_threadpool(engine.codec.encode_chat, messages)
        request = _request(body, prompt, body.max_completion_tokens or body.max_tokens, most(prompt))
        return await _answer(engine, request, body, http, _Chat(name, request, engine.num_layers))

    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(http: HttpRequest, problem: ApiError) -> Response:
        return problem.response

    @app.exception_handler(DepthKVError)
    async def refused(http: HttpRequest, problem: DepthKVError) -> Response:
        if isinstance(problem, ServerStoppedError):
            return error(503, str(problem), "server_error")
        if isinstance(problem, ServerBusyError):
            return error(429, str(problem), "rate_limit_error", code="server_busy")
        return error(400, str(problem))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        # of a field that takes several types, pydantic names the one that it tried, too
        parts = [part for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
        if len(parts) > 1 and parts[-1] in ("float", "int", "str", "bool"):
            parts.pop()
        place = "" if first["type"] == "json_invalid" else ".".join(map(str, parts))
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "expected it to be left out, since this server does not support it"
        return error(400, f"{place}: {message}" if place else message, param=place or None)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, problem: HTTPException) -> Response:
        response = error(problem.status_code, f"{problem.detail}: {http.method} {http.url.path}")
        response.headers.update(problem.headers or {})
        return response


def _add_files(app: FastAPI) -> None:
    def page(file: str) -> Callable[[], Response]:
        def serve() -> Response:  # without parameters: they would be read from the query
            return FileResponse(_PAGE / file)

        return serve

    for path, file in _FILES.items():
        app.add_api_route(path, page(file), include_in_schema=False)


def _require_model(body: schema.Sampling, name: str) -> None:
    if body.model != name:
        raise ApiError(404, f"expected the model {name!r}, got {body.model!r}", param="model", code="model_not_found")


def _request(body: schema.Sampling, prompt: Sequence[int], asked: int | None, limits: tuple[int, int]) -> Request:
    most, default = limits
    if asked is not None and asked > most:
        raise DepthKVError(f"expected max_tokens of at most {most}, got {asked}")
    return Request(
        prompt=prompt,
        max_tokens=asked or default,
        listener=lambda event: None,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=body.stops,
        kv_retention=body.kv_retention,
    )


# Answers


class _Completions:
    """How /v1/completions says it."""

    prefix, piece = "cmpl", "text_completion"

    def __init__(self, model: str, request: Request, num_layers: int) -> None:
        self.id, self.created = schema.new_id(self.prefix)
        self.model, self.request, self.num_layers = model, request, num_layers

    def whole(self, text: str, last: Progress) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        body = self._body(self.piece, self._choice(text, last.finish_reason))
        return {**body, "usage": self.usage(last), "depthkv": self.report(last)}

    def pieces(self, event: Progress, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        body = self._body(self.piece, self._delta(event, first))
        return {**body, "depthkv": self.report(event)}

    def last(self, event: Progress) -> dict[str, Any]:
        """The usage at the end of a stream."""
        return {**self._body(self.piece), "usage": self.usage(event)}

    def usage(self, event: Progress) -> dict[str, Any]:
        """Counts of tokens."""
        return schema.usage(self.request.prompt, event.num_tokens).model_dump()

    def report(self, event: Progress) -> dict[str, int]:
        """The request's cache."""
        return {
            "cache_bytes": event.cache_bytes,
            "num_leaders": event.num_leaders,
            "num_layers": self.num_layers,
        }

    def _body(self, kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
        created, model = self.created, self.model
        return {"id": self.id, "object": kind, "created": created, "model": model, "choices": list(choices)}

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}

    def _delta(self, event: Progress, first: bool) -> dict[str, Any]:
        return self._choice(event.text, event.finish_reason)


class _Chat(_Completions):
    """How /v1/chat/completions says it."""

    prefix, piece = "chatcmpl", "chat.completion.chunk"

    def whole(self, text: str, last: Progress) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason, "logprobs": None}
        body = self._body("chat.completion", choice)
        return {**body, "usage": self.usage(last), "depthkv": self.report(last)}

    def _delta(self, event: Progress, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        delta |= {"content": event.text} if event.text or first else {}
        return {"index": 0, "delta": delta, "finish_reason": event.finish_reason, "logprobs": None}


async def _answer(
    engine: Engine, request: Request, body: schema.Sampling, http: HttpRequest, form: _Completions
) -> Response | dict[str, Any]:
    """Queue a request; its room is free again when the client leaves."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Progress | Failure] = asyncio.Queue()

    def listener(event: Progress | Failure) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    request.listener = listener
    engine.submit(request)
    try:
        async with _connected(http) as left:
            event = await _next(events, left)  # before the headers, so that a failure has its own status
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return _Stream(_events(event, events, form, usage), lambda: engine.cancel(request))
            text = event.text
            while event.finish_reason is None:
                event = await _next(events, left)
                text += event.text
        return form.whole(text, event)
    except BaseException:
        engine.cancel(request)
        raise


@contextlib.asynccontextmanager
async def _connected(http: HttpRequest) -> AsyncIterator[asyncio.Task[None]]:
    """A task that ends when the client leaves."""

    async def wait() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(wait())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _next(events: asyncio.Queue[Progress | Failure], left: asyncio.Task[None]) -> Progress:
    coming = asyncio.create_task(events.get())
    try:
        await asyncio.wait({coming, left}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise ApiError(499, "expected a client that waits, got one that left")
        event = coming.result()
    finally:
        coming.cancel()
    if isinstance(event, Failure):
        raise ApiError(event.status, event.message)
    return event


class _Stream(StreamingResponse):
    """Server-sent events, and what is called when they end or the client leaves, at whatever moment."""

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _events(
    event: Progress | Failure, events: asyncio.Queue[Progress | Failure], form: _Completions, with_usage: bool
) -> AsyncIterator[str]:
    first = True
    while True:
        if isinstance(event, Failure):
            detail = {"message": event.message, "type": "server_error", "param": None, "code": None}
            yield _sse({"error": detail})
            return
        yield _sse(form.pieces(event, first))
        first = False
        if event.finish_reason is not None:
            break
        event = await events.get()
    if with_usage:
        yield _sse(form.last(event))
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
