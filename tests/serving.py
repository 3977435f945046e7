"""A fake policy and a real server in a thread, for the tests of `vla.serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvicorn
from fastapi import FastAPI

from vla.serve.server import reserve_port
from vla.types import ActionChunk, ActionDecodeError, Observation, problem

H, D, S = 3, 4, 2


class FakePolicy:
    """Actions are a function of every input, so a swapped row or camera shows. Some instructions make it misbehave."""

    def __init__(
        self, cameras: Sequence[str] = ("front",), state_names: Sequence[str] = (), wait_s: float = 0.0
    ) -> None:
        self.batch_sizes: list[int] = []
        self.seen: list[Observation] = []
        self._cameras, self._state_names, self._wait_s = tuple(cameras), tuple(state_names), wait_s

    @property
    def metadata(self) -> dict[str, Any]:
        return {"name": "fake", "horizon": H, "action_dim": D, "cameras": list(self._cameras),
                "state_names": list(self._state_names), "unnorm_key": "toy", "unnorm_keys": ["toy", "other"],
                "quantization": "none", "scale": np.float32(0.5)}  # fmt: skip

    def reset(self) -> None: ...

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.batch_sizes.append(len(observations))
        self.seen += observations
        time.sleep(self._wait_s)
        return [self._one(observation) for observation in observations]

    def _one(self, observation: Observation) -> ActionChunk:
        match observation.instruction:
            case "be refused":
                raise problem("a bad row", "a good row", "send a good row")
            case "crash":
                raise RuntimeError("secret detail")
            case "raise undecodable":
                raise ActionDecodeError("id 7 is no action token")
            case "undecodable":
                return ActionChunk(np.full((H, D), np.nan, np.float32), np.arange(H * D), None, ok=False)
        return ActionChunk(expected_actions(observation), np.arange(H * D), np.full(H * D, -0.1, np.float32))


def expected_actions(observation: Observation) -> np.ndarray:
    """What `FakePolicy` answers: float32 (H, D) with digits no float text may lose."""
    total = sum((i + 1) * float(image.mean()) for i, (_, image) in enumerate(sorted(observation.images.items())))
    state = 0.0 if observation.state is None else float(observation.state.sum())
    offset = total / 7 + state / 3 + len(observation.instruction) + sum(observation.key) / 11
    return (offset + np.arange(H * D).reshape(H, D) / 13).astype(np.float32)


def frame(seed: int = 0, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextlib.contextmanager
def running(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The application on a free port; yields its URL."""
    listener = reserve_port("127.0.0.1", port)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def ask(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """(status, JSON) of one request; `body` is JSON-able, or bytes sent as they are. POST if there is a body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    try:
        connection.request("GET" if data is None else "POST", path, data, given)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
