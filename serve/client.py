"""Client of a `vla serve` endpoint. ONE file, standard library + numpy, Python >= 3.8: copy it onto the robot.

    from client import PolicyClient

    client = PolicyClient("http://gpu-box:8000")
    chunk = client.act([{"images": {"front": frame}, "instruction": "pick up the red cup"}])[0]
    if chunk.ok:
        for action in chunk.actions:      # float32 (H, D), un-normalised
            robot.step(action)

Images are sent as they are, uint8 RGB (height, width, 3), without loss. A policy whose `client.metadata["history"]` is K > 0
is shown what the robot did: add "past_actions": executed[-K:], the actions of this episode as they were executed, oldest
first; an empty list at its beginning. A policy whose metadata lists "motions" says in `chunk.motion` what it does, and is
corrected by "motion": "move arm up" in an observation.
"""

from __future__ import annotations  # lets Python 3.8 read today's annotations

import base64
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np


class ActionChunk(NamedTuple):
    """The server's answer to one observation."""

    actions: np.ndarray
    """float32 (H, D), un-normalised; NaN if not `ok`."""
    token_ids: np.ndarray | None
    """int64 (T,), or None for a policy without tokens."""
    logprobs: np.ndarray | None
    """float32 (T,), or None."""
    ok: bool
    """False: the model's output was not an action. Do not move."""
    latency_ms: float
    """Time inside the server for the whole request."""
    motion: str = ""
    """The language motion that the actions follow; empty for a policy without."""


class PolicyServerError(RuntimeError):
    """The server refused or did not answer. `got`, `expected` and `fix` say why; `status` is 0 without an answer."""

    def __init__(self, status: int, got: str, expected: str, fix: str) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.status = status
        self.got = got
        self.expected = expected
        self.fix = fix


class PolicyClient:
    """Keeps connections open between calls and may be used from several threads at once.

    Args:
        url: e.g. "http://127.0.0.1:8000".
        api_key: sent as `Authorization: Bearer`.
        timeout_s: for connecting and for each wait on the server; a timed-out query is not repeated.
        retries: further tries when the connection breaks or the server says it is full; asking twice is harmless.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 10.0, retries: int = 3) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"got url {url!r}; expected http://host:port; fix: correct the url")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = "Bearer " + api_key
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._pid = os.getpid()
        self._metadata: dict[str, Any] | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What is served; asked for once."""
        if self._metadata is None:
            self._metadata = self._json("GET", "/metadata", None)
        return self._metadata

    def health(self) -> dict[str, Any]:
        return self._json("GET", "/health", None)

    def reset(self) -> None:
        """Nothing to forget: the server keeps nothing between queries."""

    def act(self, observations: Sequence[Any]) -> list[ActionChunk]:
        """One chunk per observation, in order.

        Args:
            observations: objects with `images`, `state`, `instruction` and `key`, or dicts with these keys
                (`state` and `key` may be missing); both may have `past_actions` and `motion`. Anything else they carry is not sent.
        """
        if not observations:
            return []
        body = b'{"observations": [' + b", ".join(_observation_json(item) for item in observations) + b"]}"
        reply = self._json("POST", "/v1/act", body)
        return [_chunk(result, reply["latency_ms"]) for result in reply["results"]]

    def wait_until_ready(self, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait for a server that is still loading; PolicyServerError if it is not up in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self.health()
            except PolicyServerError as error:
                if error.status not in (0, 503) or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.2)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _json(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        status, data = self._with_retries(method, path, body)
        try:
            value = json.loads(data.decode("utf-8"))
        except ValueError:
            value = None
        if status == 200 and isinstance(value, dict):
            return value
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict) and {"got", "expected", "fix"} <= set(error):
            raise PolicyServerError(status, error["got"], error["expected"], error["fix"])
        got = f"HTTP {status} from {self.url}{path}: {data[:200]!r}"
        raise PolicyServerError(status, got, "the answer of a vla server", "check that the url is that of `vla serve`")

    def _with_retries(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                status, data = self._once(method, path, body)
                if status != 503 or last:
                    return status, data
            except socket.timeout as error:  # noqa: UP041 - not yet an alias of TimeoutError in Python 3.8
                got = f"no answer from {self.url} within {self.timeout_s:g} s"
                raise PolicyServerError(0, got, "an answer", "raise timeout_s, or look at the server") from error
            except (OSError, http.client.HTTPException) as error:
                if last:
                    got = f"no connection to {self.url} ({str(error) or type(error).__name__})"
                    fix = "start it with `vla serve`, check host and port"
                    raise PolicyServerError(0, got, "a server", fix) from error
            time.sleep(min(2.0, 0.1 * 2**attempt))
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = self._take()
        if connection is not None:
            try:
                return self._exchange(connection, method, path, body)
            except (ConnectionError, http.client.HTTPException):
                pass  # the server closed a connection that lay idle; a fresh one shows whether it is still there
        return self._exchange(self._connect(), method, path, body)

    def _exchange(self, connection: Any, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
            response = connection.getresponse()
            data = response.read()
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return response.status, data

    def _take(self) -> http.client.HTTPConnection | None:
        with self._lock:
            if self._pid != os.getpid():  # after a fork, parent and child must not share a socket
                self._pid, self._idle = os.getpid(), []
            return self._idle.pop() if self._idle else None

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout_s)


def _observation_json(item: Any) -> bytes:
    if isinstance(item, dict):
        images, state, instruction, key = item["images"], item.get("state"), item["instruction"], item.get("key")
        past_actions, motion = item.get("past_actions"), item.get("motion")
    else:
        images, state, instruction, key = item.images, item.state, item.instruction, item.key
        past_actions, motion = getattr(item, "past_actions", None), getattr(item, "motion", "")
    named = [json.dumps(name).encode() + b": " + _image_json(name, image) for name, image in images.items()]
    rest: dict[str, Any] = {"instruction": instruction, "key": [int(part) for part in key or ()]}
    if state is not None:
        rest["state"] = np.asarray(state, np.float64).tolist()
    if past_actions is not None:
        rest["past_actions"] = np.asarray(past_actions, np.float64).tolist()
    if motion:
        rest["motion"] = motion
    # Put together by hand: json.dumps would look at every character of the images again.
    return b"".join([b'{"images": {', b", ".join(named), b"}, ", json.dumps(rest).encode()[1:]])


def _image_json(name: str, image: Any) -> bytes:
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3:
        got = f"image {name!r} of shape {array.shape}, {array.dtype}"
        raise PolicyServerError(0, got, "uint8 RGB (height, width, 3)", "convert it before sending")
    shape = json.dumps(list(array.shape)).encode()
    return b"".join([b'{"__numpy__": "', base64.b64encode(array.data), b'", "dtype": "|u1", "shape": ', shape, b"}"])


def _chunk(result: dict[str, Any], latency_ms: float) -> ActionChunk:
    if result["ok"]:
        actions = np.asarray(result["actions"], np.float32).reshape(result["shape"])
    else:
        actions = np.full(result["shape"], np.nan, np.float32)
    ids, logprobs = result["token_ids"], result["logprobs"]
    return ActionChunk(
        actions=actions,
        token_ids=None if ids is None else np.asarray(ids, np.int64),
        logprobs=None if logprobs is None else np.asarray(logprobs, np.float32),
        ok=bool(result["ok"]),
        latency_ms=float(latency_ms),
        motion=result.get("motion", ""),
    )
