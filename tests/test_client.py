"""The robot's client: alone in its file, old syntax, exact values, broken connections; and the `Policy` on top of it."""

from __future__ import annotations

import ast
import http.server
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import D, FakePolicy, H, expected_actions, frame, running

from vla.serve.app import make_app
from vla.serve.client import PolicyClient, PolicyServerError
from vla.serve.process import free_port
from vla.serve.remote_policy import RemotePolicy
from vla.types import Observation, Policy, VlaError

SOURCE = Path(__file__).parents[1] / "serve" / "client.py"


@pytest.fixture(autouse=True)
def close_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[PolicyClient] = []
    init = PolicyClient.__init__

    def remember(self: PolicyClient, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(PolicyClient, "__init__", remember)
    yield
    for client in made:
        if "_lock" in vars(client):
            client.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(make_app(FakePolicy(("front", "wrist")))) as address:
        yield address


def observation(seed: int = 0, **change: object) -> Observation:
    values = {"images": {"front": frame(seed), "wrist": frame(seed + 1, 8, 8)}, "instruction": "pick up the cup",
              "state": np.array([0.1, 1 / 3], np.float32), "key": (7, seed)}  # fmt: skip
    return Observation(**{**values, **change})  # type: ignore[arg-type]


def test_python_38_reads_it_and_it_needs_only_numpy() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in modules}
    assert roots - sys.stdlib_module_names == {"numpy"}
    lazy = isinstance(tree.body[1], ast.ImportFrom) and tree.body[1].module == "__future__"
    assert lazy, "without it Python 3.8 evaluates `list[...]` and `X | None`"


def test_a_copy_of_the_file_works_alone(url: str, tmp_path: Path) -> None:
    copy = tmp_path / "robot_client.py"
    copy.write_bytes(SOURCE.read_bytes())
    spec = importlib.util.spec_from_file_location("robot_client", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.PolicyClient(url) as client:
        assert client.health()["ready"] is True


def test_values_survive_exactly(url: str) -> None:
    client = PolicyClient(url)
    one = observation(3)
    as_dict = {"images": one.images, "instruction": one.instruction, "state": one.state, "key": list(one.key)}
    as_object = SimpleNamespace(**as_dict)
    strided = observation(3, images={name: image[::-1][::-1] for name, image in one.images.items()})
    for chunk in client.act([one, as_dict, as_object, strided]):
        assert chunk.ok and chunk.actions.dtype == np.float32 and chunk.latency_ms > 0
        np.testing.assert_array_equal(chunk.actions, expected_actions(one))
        assert chunk.token_ids is not None and chunk.token_ids.dtype == np.int64
        assert chunk.logprobs is not None and chunk.logprobs.dtype == np.float32
        np.testing.assert_array_equal(chunk.logprobs, np.full(H * D, -0.1, np.float32))
    plain = client.act([{"images": one.images, "instruction": "go"}])[0]
    np.testing.assert_array_equal(plain.actions, expected_actions(Observation(one.images, None, "go")))
    assert client.act([]) == []
    client.reset()


def test_undecodable_is_nan_and_not_ok(url: str) -> None:
    bad, good = PolicyClient(url).act([observation(instruction="undecodable"), observation()])
    assert not bad.ok and bad.actions.shape == (H, D) and np.isnan(bad.actions).all()
    assert good.ok


def test_one_connection_is_kept(url: str) -> None:
    client = PolicyClient(url)
    client.act([observation()])
    (kept,) = client._idle
    client.act([observation()])
    assert client._idle == [kept]
    client.close()
    assert client._idle == [] and client.health()["ready"]


def test_many_threads(url: str) -> None:
    client = PolicyClient(url)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for i in range(5):
            item = observation(seed * 10 + i)
            if not np.array_equal(client.act([item])[0].actions, expected_actions(item)):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and 1 <= len(client._idle) <= 6


def test_the_servers_reasons_reach_the_caller(url: str) -> None:
    with pytest.raises(PolicyServerError, match="cameras.*fix: send wrist") as caught:
        PolicyClient(url).act([observation(images={"front": frame()})])
    assert caught.value.status == 400 and "wrist" in caught.value.fix
    with pytest.raises(PolicyServerError, match="float64; expected uint8 RGB"):
        PolicyClient(url).act([observation(images={"front": frame() / 255.0})])
    with pytest.raises(ValueError, match="expected http://host:port"):
        PolicyClient("localhost:8000")


def test_api_key_is_sent() -> None:
    with running(make_app(FakePolicy(), api_key="s3cret")) as address:
        item = observation(images={"front": frame()})
        assert PolicyClient(address, api_key="s3cret").act([item])[0].ok
        with pytest.raises(PolicyServerError, match="no API key") as caught:
            PolicyClient(address).act([item])
        assert caught.value.status == 401


def test_a_restarted_server_is_found_again() -> None:
    port = free_port()
    with running(make_app(FakePolicy()), port) as address:
        client = PolicyClient(address)
        item = observation(images={"front": frame()})
        before = client.act([item])[0].actions
    with running(make_app(FakePolicy()), port):
        np.testing.assert_array_equal(client.act([item])[0].actions, before)


def test_a_server_that_is_full_is_asked_again() -> None:
    with running(make_app(FakePolicy(wait_s=0.1), max_batch=1, max_waiting=1, batch_window_ms=0.0)) as address:
        client = PolicyClient(address, retries=20)
        item = observation(images={"front": frame()})
        oks: list[bool] = []
        threads = [threading.Thread(target=lambda: oks.append(client.act([item])[0].ok)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert oks == [True] * 4


def test_nobody_there() -> None:
    port = free_port()
    start_s = time.monotonic()
    with pytest.raises(PolicyServerError, match=f"no connection to http://127.0.0.1:{port}.*vla serve") as caught:
        PolicyClient(f"http://127.0.0.1:{port}", retries=2).health()
    assert caught.value.status == 0 and 0.25 < time.monotonic() - start_s < 5
    with pytest.raises(PolicyServerError):
        PolicyClient(f"http://127.0.0.1:{port}", retries=0).wait_until_ready(0.3)
    with pytest.raises(VlaError, match="vla serve"):
        RemotePolicy(f"http://127.0.0.1:{port}", retries=0)
    with pytest.raises(VlaError, match="got url 'nonsense'"):
        RemotePolicy("nonsense")


def test_a_slow_server_is_named_and_not_asked_twice() -> None:
    policy = FakePolicy(wait_s=0.6)
    with running(make_app(policy)) as address:
        with pytest.raises(PolicyServerError, match="within 0.2 s.*raise timeout_s"):
            PolicyClient(address, timeout_s=0.2).act([observation(images={"front": frame()})])
        assert len(policy.batch_sizes) == 1


def test_something_that_is_no_vla_server() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(PolicyServerError, match="(?s)HTTP 200 .*<html>.*the answer of a vla server"):
            PolicyClient(f"http://127.0.0.1:{server.server_address[1]}").health()
        server.shutdown()
        thread.join()


def test_remote_policy_is_a_policy_equal_to_the_local_one(url: str) -> None:
    remote, local = RemotePolicy(url), FakePolicy(("front", "wrist"))
    assert isinstance(remote, Policy)
    assert remote.metadata["horizon"] == H and remote.metadata["action_dim"] == D
    items = [observation(i, privileged=np.ones(3)) for i in range(5)] + [observation(instruction="undecodable")]
    for ours, theirs in zip(remote.act(items), local.act(items), strict=True):
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        assert ours.ok == theirs.ok and ours.actions.dtype == np.float32
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    remote.reset()
    with pytest.raises(VlaError, match="fix: send wrist"):
        remote.act([observation(images={"front": frame()})])
    remote.close()
