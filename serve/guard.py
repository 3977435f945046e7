"""What every request passes first: API key, body size, counting, and the last net for our own bugs."""

from __future__ import annotations

import hmac
import json
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vla.serve.batching import internal_error
from vla.serve.errors import RequestError
from vla.serve.metrics import Metrics

OPEN_PATHS = {"/health"}
"""Answered without an API key, for load balancers."""


class Guard:
    """ASGI middleware. Reads the whole body within its limit before the application sees anything of it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_body_mb: float) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = api_key
        self._max_body_bytes = int(max_body_mb * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.perf_counter()
        sent = Sent(send)
        try:
            allowed = self._has_key(scope)
            body = await self._read(receive, keep=allowed)
            if not allowed:
                raise RequestError(401, "no API key, or a wrong one", "the header Authorization: Bearer <key>",
                                   "ask whoever runs this server for its key")  # fmt: skip
            await self._app(scope, _replay(body, receive), sent)
        except RequestError as error:
            await _send_error(error, sent)
        except Exception as error:  # our own bug: logged with its traceback under the id the client gets
            if sent.status:
                raise
            await _send_error(internal_error(error), sent)
        if scope["method"] == "POST":
            self._metrics.record(sent.status, (time.perf_counter() - start_s) * 1e3)

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, f"Bearer {self._api_key}".encode())

    async def _read(self, receive: Receive, keep: bool) -> bytes:
        """The body. A refused one is still read, though not kept: a client that is sending would miss the answer."""
        limit = self._max_body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= 8 * limit:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if keep and size <= limit:
                parts.append(part)
            more = message.get("more_body", False)
        if keep and size > limit:
            raise RequestError(413, f"a body of {size} bytes", f"at most {limit / 2**20:g} MiB",
                               "send smaller or fewer images, or start the server with --max-body-mb")  # fmt: skip
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Sent:
    """`send` that remembers the status."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _send_error(error: RequestError, send: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
