"""What is checked before a request is read: its key, its size, and how long it takes to arrive."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

OPEN = frozenset({"/", "/playground.js", "/playground.css", "/health"})
"""Paths that need no key: the page itself, whose requests do, and what says that the server is there."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def error(status: int, message: str, kind: str = "invalid_request_error", **more: str | None) -> JSONResponse:
    """An answer in OpenAI's form."""
    detail = {"message": message, "type": kind, "param": None, "code": None, **more}
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse({"error": detail}, status, headers)


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        api_key: expected as `Authorization: Bearer KEY`; None asks for none.
        max_body: bytes.
        receive_s: seconds in which the body has to arrive.
    """

    def __init__(self, app: Any, api_key: str | None, max_body: int, receive_s: float = 30.0) -> None:
        self._app, self._key, self._max_body, self._receive_s = app, api_key, max_body, receive_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        body = await self._refuse(scope, receive)
        if isinstance(body, JSONResponse):
            await body(scope, receive, send_with_headers)
            return
        given = False

        async def receive_body() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send_with_headers)

    async def _refuse(self, scope: Any, receive: Any) -> bytes | JSONResponse:
        """The body, or why the request goes no further."""
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._key.encode()):
                return error(
                    401, "expected the server's API key as a bearer token, got none or another", code="api_key"
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":  # others a foreign page could send unasked
            return error(415, f"expected the content type application/json, got {kind[:100] or 'none'}")
        too_large = error(413, f"expected a body of at most {self._max_body:,} bytes, got a larger one")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            return too_large
        try:
            body = await asyncio.wait_for(self._read(receive), self._receive_s)
        except (asyncio.TimeoutError, TimeoutError):
            return error(408, f"expected the whole body within {self._receive_s:g} seconds, got a part of it")
        return too_large if body is None else body

    async def _read(self, receive: Any) -> bytes | None:
        """The body; None where it is too large."""
        body: bytes = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body:
                return None
            if not message.get("more_body", False):  # a disconnect has none, too
                return body
