"""The inference endpoint: a FastAPI application around any `Policy`.

    POST /act       OpenVLA's protocol (json_numpy, plain or double-encoded), and OpenVLA-OFT's; see `Endpoint.act`
    POST /v1/act    typed JSON, one observation or several, with token ids and log-probabilities; see `schemas.py`
    GET  /health    is it up    GET /metadata  what it serves    GET /metrics  how it is doing    GET /docs  try it

Errors are 4xx/5xx with {"error": {"got", "expected", "fix"}}; `errors.py` lists the codes.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from importlib import metadata as distributions
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from vla.serve import wire
from vla.serve.batching import Batcher
from vla.serve.errors import RequestError, as_request_error, undecodable
from vla.serve.guard import Guard
from vla.serve.metrics import Metrics
from vla.serve.observations import check_unnorm_key, inputs_of, observation_of
from vla.serve.schemas import ActReply, ActRequest, BatchReply, is_usable, result_json
from vla.types import ActionChunk, Observation, Policy, VlaError

LIBRARIES = ("vla-toolkit", "numpy", "torch", "transformers", "bitsandbytes", "fastapi", "uvicorn")


def make_app(
    policy: Policy,
    *,
    api_key: str | None = None,
    max_body_mb: float = 64.0,
    max_batch: int = 16,
    batch_window_ms: float = 3.0,
    max_waiting: int = 256,
    quantization: str | None = None,
) -> FastAPI:
    """The application that serves `policy`.

    Args:
        api_key: if given, every path but /health needs `Authorization: Bearer <api_key>`.
        max_body_mb: larger bodies are refused with 413.
        max_batch: rows per `policy.act`; more are split.
        batch_window_ms: how long a row waits for others while requests overlap. A lone client never waits.
        max_waiting: rows that may wait for the model; further requests get 503.
        quantization: what is really in use, shown by /metadata when the policy's own metadata does not say.
    """
    batcher = Batcher(policy, max_batch, batch_window_ms / 1e3, max_waiting)
    endpoint = Endpoint(policy, batcher, quantization)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(title="vla serve", version=_version("vla-toolkit") or "0", lifespan=lifespan)
    app.router.route_class = FastJsonRoute
    app.add_middleware(Guard, metrics=endpoint.metrics, api_key=api_key, max_body_mb=max_body_mb)
    app.add_api_route("/act", endpoint.act, methods=["POST"], response_class=Response, summary="OpenVLA's protocol")
    app.add_api_route("/v1/act", endpoint.act_v1, methods=["POST"], response_model=ActReply | BatchReply)
    app.add_api_route("/health", endpoint.health, methods=["GET"])
    app.add_api_route("/metadata", endpoint.metadata, methods=["GET"])
    app.add_api_route("/metrics", endpoint.report, methods=["GET"])
    app.add_exception_handler(VlaError, _on_vla_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


class FastJsonRequest(Request):
    """Reads JSON with pydantic's parser: 0.01 ms instead of 0.3 for a 224 x 224 image, mostly one long string."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class FastJsonRoute(APIRoute):
    """FastAPI's route with that reader."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(FastJsonRequest(request.scope, request.receive))

        return handler


class Endpoint:
    """The handlers and what they share."""

    def __init__(self, policy: Policy, batcher: Batcher, quantization: str | None) -> None:
        self.metrics = Metrics()
        self._batcher = batcher
        self._metadata = _metadata(policy, quantization)
        self._inputs = inputs_of(self._metadata)

    async def act(self, request: Request) -> Response:
        """OpenVLA's protocol. Every array is in json_numpy's form.

        Body, one of:
            {"image": uint8 (h, w, 3), "instruction": str, "unnorm_key": str?, "state": (S,)?}
            {"images": {camera: uint8 (h, w, 3)}, ...} for several cameras; `"chunk": true` asks for all H actions
            {"full_image": ..., "*wrist*": ..., "state": ..., "instruction": ...} as OpenVLA-OFT sends it
            {"encoded": "<JSON text of one of the above>"}
        A policy that is shown past actions is sent them as "past_actions": (n, D), (0, D) or [] at the beginning.

        Reply: float32 (D,), the chunk's first action, as a json_numpy object; (H, D) with `chunk`; for OpenVLA-OFT's
        body a list of H arrays (D,). An encoded body is answered by a JSON string that holds that reply's JSON.
        """
        body = _json_object(await request.body(), "the body")
        encoded = "encoded" in body
        if encoded:
            body = _decoded(body)
        check_unnorm_key(body.get("unnorm_key"), self._inputs)
        (chunk,) = await self._act([observation_of(body, self._inputs)])
        if not is_usable(chunk):
            raise undecodable()
        text = wire.dumps(_openvla_reply(chunk, body))
        return Response(json.dumps(text) if encoded else text, media_type="application/json")

    async def act_v1(self, body: ActRequest) -> Response:
        """Action chunks with token ids and log-probabilities."""
        start_s = time.perf_counter()
        check_unnorm_key(body.unnorm_key, self._inputs)
        single = body.observations is None
        plain = body.model_dump(by_alias=True, exclude_none=True)
        if not single and set(plain) - {"observations", "unnorm_key"}:
            raise RequestError(400, f"observations and {', '.join(sorted(set(plain) - {'observations'}))}",
                               "either one observation or a list", "move them into `observations`")  # fmt: skip
        rows = [plain] if single else plain["observations"]
        chunks = await self._act([observation_of(row, self._inputs) for row in rows])
        results = [result_json(chunk) for chunk in chunks]
        latency = {"latency_ms": round((time.perf_counter() - start_s) * 1e3, 3)}
        return _plain_json({**results[0], **latency} if single else {"results": results, **latency})

    async def _act(self, observations: list[Observation]) -> list[ActionChunk]:
        answers = await self._batcher.act(observations)
        chunks = []
        for answer in answers:
            if isinstance(answer, RequestError):
                if answer.status == 502:
                    self.metrics.undecodable += 1
                raise answer
            self.metrics.undecodable += not is_usable(answer)
            chunks.append(answer)
        return chunks

    async def health(self) -> dict[str, Any]:
        """Answers as soon as the policy is loaded; needs no API key."""
        return {"ready": True, **self.metrics.counts(), "waiting": self._batcher.waiting}

    async def metadata(self) -> Response:
        """The policy's metadata, the quantization in use and library versions."""
        return _plain_json(self._metadata)

    async def report(self) -> dict[str, Any]:
        """Counts, latency percentiles over the latest requests, mean rows per model call."""
        mean_batch = self._batcher.rows / self._batcher.batches if self._batcher.batches else None
        return {**self.metrics.counts(), "latency_ms": self.metrics.latency_ms(), "mean_batch": mean_batch}


def _openvla_reply(chunk: ActionChunk, body: Mapping[str, Any]) -> Any:
    actions = np.asarray(chunk.actions, np.float32)
    if "full_image" in body:
        return list(actions)
    return actions if body.get("chunk") is True else actions[0]


def _json_object(text: bytes | str, name: str) -> dict[str, Any]:
    try:
        value = from_json(text)
    except ValueError as error:
        raise RequestError(400, f"{name} that is not JSON ({error})", "a JSON object", "send JSON text") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"{name} of type {type(value).__name__}", "a JSON object", 'send {"image": ...}')
    return value


def _decoded(body: dict[str, Any]) -> dict[str, Any]:
    if set(body) != {"encoded"} or not isinstance(body["encoded"], str):
        fix = "move the rest into that string"
        raise RequestError(400, f"the keys {sorted(body)}", 'only "encoded", a string', fix)
    return _json_object(body["encoded"], '"encoded"')


def _metadata(policy: Policy, quantization: str | None) -> dict[str, Any]:
    versions = {name: version for name in LIBRARIES if (version := _version(name))}
    own = {"protocol": 1, "quantization": quantization, "python": platform.python_version(), "versions": versions}
    return json.loads(json.dumps({**own, **policy.metadata}, default=_listed))


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)


def _version(name: str) -> str | None:
    try:
        return distributions.version(name)
    except distributions.PackageNotFoundError:
        return None


def _plain_json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _on_vla_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, VlaError)  # what the handler is registered for
    refusal = as_request_error(error)
    return JSONResponse(refusal.body, refusal.status)


def _on_invalid(_: Request, error: Exception) -> Response:
    """The first of pydantic's complaints in our form, without echoing whole images."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    got = f"{where}: {str(first.get('input'))[:80]}"
    fix = "see /docs for the body of /v1/act; send it with the header Content-Type: application/json"
    return _on_vla_error(_, RequestError(400, got, first["msg"], fix))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = "POST /act, POST /v1/act, GET /health, GET /metadata, GET /metrics, GET /docs"
    got = f"{request.method} {request.url.path}"
    return _on_vla_error(request, RequestError(error.status_code, f"{got} ({error.detail})", f"one of {paths}",
                                               "correct method and path"))  # fmt: skip
