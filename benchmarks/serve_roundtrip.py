"""One `/act` round trip with a policy that does nothing, against a plain OpenVLA-style server.

Run it with `python -m benchmarks.serve_roundtrip`. The peer needs the packages `json_numpy` and `requests`.

The peer is what OpenVLA's `deploy.py` amounts to without its model: FastAPI, `json_numpy.patch()`, a synchronous handler.
Servers are processes of their own; queries alternate between them. Three comparisons, equal answers asserted in each:

- server: the same bytes from the same bare client to both `/act`;
- pair: each server with its own client (`PolicyClient` on /v1/act; requests + json_numpy on /act, as OpenVLA's README);
- double: the double-encoded form, bare client.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from vla.serve import wire
from vla.serve.client import PolicyClient
from vla.serve.process import free_port
from vla.types import ActionChunk, Observation

ACTION = np.linspace(-1, 1, 7, dtype=np.float32)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    queries: int = 300
    """Per server and comparison."""
    warm_up: int = 30
    """Queries before the clock runs."""
    side_px: int = 224
    """Image side."""


class NullPolicy:
    """Answers at once."""

    metadata: dict[str, Any] = {"name": "null", "horizon": 1, "action_dim": 7, "cameras": ["image"]}

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [ActionChunk(ACTION[None]) for _ in observations]

    def reset(self) -> None: ...


def serve_ours(port: int) -> None:
    from vla.serve.app import make_app
    from vla.serve.server import reserve_port, serve

    serve(make_app(NullPolicy()), reserve_port("127.0.0.1", port))


def serve_peer(port: int) -> None:
    import json_numpy  # pyright: ignore[reportMissingImports]

    json_numpy.patch()
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    def act(payload: dict[str, Any]) -> Any:
        encoded = "encoded" in payload
        if encoded:
            payload = json.loads(payload["encoded"])
        assert payload["image"].dtype == np.uint8 and isinstance(payload["instruction"], str)
        return JSONResponse(json_numpy.dumps(ACTION)) if encoded else JSONResponse(ACTION)

    app = FastAPI()
    app.post("/act")(act)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def run(settings: Settings) -> dict[str, Any]:
    """{comparison: p50 and p99 of both in ms, and their ratio}; empty, with a warning, without the peer's packages."""
    missing = [name for name in ("json_numpy", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"SKIPPED: the peer needs {' and '.join(missing)} (pip install {' '.join(missing)})", file=sys.stderr)
        return {}
    context = multiprocessing.get_context("spawn")
    ports = {"ours": free_port(), "openvla_style": free_port()}
    servers = [
        context.Process(target=serve_ours, args=(ports["ours"],), daemon=True),
        context.Process(target=serve_peer, args=(ports["openvla_style"],), daemon=True),
    ]
    for server in servers:
        server.start()
    try:
        for port in ports.values():
            wait_for(port)
        return {name: compare(routes, settings) for name, routes in make_routes(ports, settings).items()}
    finally:
        for server in servers:
            server.terminate()
            server.join()


def make_routes(ports: dict[str, int], settings: Settings) -> dict[str, dict[str, Callable[[], np.ndarray]]]:
    """{comparison: {server: a function that makes one query}}."""
    import requests  # pyright: ignore[reportMissingModuleSource]
    from json_numpy import dumps, loads  # pyright: ignore[reportMissingImports]

    frame = np.random.default_rng(0).integers(0, 256, (settings.side_px, settings.side_px, 3), dtype=np.uint8)
    payload = {"image": frame, "instruction": "pick up the red cup"}
    plain = dumps(payload).encode()
    double = json.dumps({"encoded": dumps(payload)}).encode()
    ours = PolicyClient(f"http://127.0.0.1:{ports['ours']}")
    observation = Observation({"image": frame}, None, payload["instruction"])
    session = requests.Session()
    peer_url = f"http://127.0.0.1:{ports['openvla_style']}/act"
    headers = {"Content-Type": "application/json"}

    def peer_pair() -> np.ndarray:
        return loads(session.post(peer_url, dumps(payload), headers=headers).text)

    return {
        "server": {name: bare(port, plain, wire.decode) for name, port in ports.items()},
        "pair": {"ours": lambda: ours.act([observation])[0].actions[0], "openvla_style": peer_pair},
        "double": {
            name: bare(port, double, lambda text: wire.decode(json.loads(text))) for name, port in ports.items()
        },
    }


def bare(port: int, body: bytes, read: Callable[[Any], np.ndarray]) -> Callable[[], np.ndarray]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def query() -> np.ndarray:
        connection.request("POST", "/act", body, {"Content-Type": "application/json"})
        return read(json.loads(connection.getresponse().read()))

    return query


def compare(routes: dict[str, Callable[[], np.ndarray]], settings: Settings) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in routes}
    for i in range(settings.warm_up + settings.queries):
        for name, query in routes.items():
            start_s = time.perf_counter()
            action = query()
            if i >= settings.warm_up:
                times[name].append((time.perf_counter() - start_s) * 1e3)
            assert action.dtype == np.float32 and np.array_equal(action, ACTION), f"{name} answered {action}"
    row = {}
    for name, values in times.items():
        row[f"{name}_p50_ms"], row[f"{name}_p99_ms"] = (round(float(q), 3) for q in np.percentile(values, [50, 99]))
    row["ratio_p50"] = round(row["openvla_style_p50_ms"] / row["ours_p50_ms"], 2)
    return row


def wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/openapi.json")
            connection.getresponse().read()
            connection.close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Settings)), indent=2))
