"""The endpoint: protocol, refusals, batching, limits; over a real socket, with a fake policy."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import D, FakePolicy, H, ask, expected_actions, frame, running

from vla.serve import wire
from vla.serve.app import make_app
from vla.serve.client import PolicyClient
from vla.serve.process import ServerProcess, flags, free_port
from vla.serve.server import Settings, reserve_port, run
from vla.types import Observation, VlaError

FRAME = frame()
ACTIONS = expected_actions(Observation({"front": FRAME}, None, "pick up the cup"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(make_app(FakePolicy(), max_body_mb=1.0)) as address:
        yield address


@pytest.fixture(scope="module")
def two_cameras() -> Iterator[str]:
    with running(make_app(FakePolicy(("front", "wrist"), ("x", "y")))) as address:
        yield address


def body(**change: object) -> dict[str, object]:
    whole = {"image": wire.encode(FRAME), "instruction": "pick up the cup", **change}
    return {name: value for name, value in whole.items() if value is not None}


def typed(**change: object) -> dict[str, object]:
    return body(image=None, images={"front": wire.encode(FRAME)}, **change)


def test_act_answers_openvlas_request_with_a_json_numpy_object(url: str) -> None:
    for key in (None, "toy"):
        status, reply = ask(url, "/act", body(unnorm_key=key))
        assert status == 200 and set(reply) == {"__numpy__", "dtype", "shape"}
        assert reply["shape"] == [D] and reply["dtype"] == "<f4"
        np.testing.assert_array_equal(wire.decode(reply), ACTIONS[0])


def test_act_double_encoded(url: str) -> None:
    status, reply = ask(url, "/act", {"encoded": json.dumps(body())})
    assert status == 200 and isinstance(reply, str)
    np.testing.assert_array_equal(wire.decode(json.loads(reply)), ACTIONS[0])


def test_act_whole_chunk_without_content_type(url: str) -> None:
    data = json.dumps(body(chunk=True)).encode()
    status, reply = ask(url, "/act", data, {"Content-Type": "text/plain"})
    assert status == 200
    np.testing.assert_array_equal(wire.decode(reply), ACTIONS)


def test_act_with_cameras_by_name_and_as_openvla_oft_sends_them(two_cameras: str) -> None:
    front, wrist, state = frame(1), frame(2, 4, 8), np.array([0.25, -3.0])
    expected = expected_actions(Observation({"front": front, "wrist": wrist}, state.astype(np.float32), "go"))
    rest = {"state": wire.encode(state), "instruction": "go"}
    images = {"wrist": wire.encode(wrist), "front": wire.encode(front)}
    status, reply = ask(two_cameras, "/act", {"images": images, "chunk": True, **rest})
    assert status == 200
    np.testing.assert_array_equal(wire.decode(reply), expected)
    oft = {"full_image": wire.encode(front), "wrist_image": wire.encode(wrist), **rest}
    status, reply = ask(two_cameras, "/act", oft)
    assert status == 200 and isinstance(reply, list) and len(reply) == H
    np.testing.assert_array_equal(np.stack([wire.decode(row) for row in reply]), expected)


def test_v1_act_single(url: str) -> None:
    status, reply = ask(url, "/v1/act", typed(key=[3, 5]))
    expected = expected_actions(Observation({"front": FRAME}, None, "pick up the cup", (3, 5)))
    assert status == 200 and reply["ok"] and reply["shape"] == [H, D] and reply["latency_ms"] > 0
    np.testing.assert_array_equal(np.array(reply["actions"], np.float32), expected)
    assert reply["token_ids"] == list(range(H * D))
    assert np.array(reply["logprobs"], np.float32).tolist() == [np.float32(-0.1)] * (H * D)


def test_v1_act_several_in_order(url: str) -> None:
    observations = [Observation({"front": frame(i)}, None, "go" * (i + 1)) for i in range(20)]  # more than max_batch
    rows = [{"images": {"front": wire.encode(o.images["front"])}, "instruction": o.instruction} for o in observations]
    status, reply = ask(url, "/v1/act", {"observations": rows, "unnorm_key": "toy"})
    assert status == 200
    got = np.array([result["actions"] for result in reply["results"]], np.float32)
    np.testing.assert_array_equal(got, [expected_actions(o) for o in observations])


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_png_images(url: str, prefix: str) -> None:
    status, reply = ask(url, "/v1/act", body(image=None, images={"front": prefix + encoded_file(FRAME, "PNG")}))
    assert status == 200
    np.testing.assert_array_equal(np.array(reply["actions"], np.float32), ACTIONS)


def test_jpeg_images(url: str) -> None:
    smooth = np.full((16, 16, 3), 90, np.uint8)
    assert ask(url, "/v1/act", body(image=None, images={"front": encoded_file(smooth, "JPEG")}))[0] == 200


def encoded_file(array: np.ndarray, kind: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def array(shape: tuple[int, ...], dtype: str = "u1") -> dict[str, object]:
    return wire.encode(np.zeros(shape, dtype))


REFUSED = [
    (body(instruction=None), "no instruction", "in words"),
    (body(instruction="  "), "instruction '  '", "in words"),
    (body(instruction=7), "instruction 7", "in words"),
    (body(instruction="a" * 5000), "5000 characters", "at most 4096"),
    (body(image=None), "no image", "cameras ['front']"),
    (body(images={"front": array((2, 2, 3))}), "image and images", "cameras ['front']"),
    (body(image=None, images={"frnt": array((2, 2, 3))}), "cameras ['frnt']", "all of ['front']"),
    (body(image=None, images=[1]), "images of type list", "cameras ['front']"),
    (body(image=array((2, 2, 3), "f4")), "image 'front': dtype float32", "uint8, 0..255"),
    (body(image=array((3, 2, 2))), "shape (3, 2, 2)", "(height, width, 3)"),
    (body(image=array((0, 2, 3))), "shape (0, 2, 3)", "sides 1..4096"),
    (body(image=array((5000, 1, 3))), "shape (5000, 1, 3)", "sides 1..4096"),
    (body(image=[[0, 0, 0]]), "a JSON list of 1", "json_numpy's form"),
    (body(image={**wire.encode(FRAME), "shape": [6, 5, 4]}), "base64 characters", "for shape [6, 5, 4]"),
    (body(image={**wire.encode(FRAME), "dtype": "|O"}), "dtype '|O'", "a plain bool"),
    (body(image="not a png"), "image 'front'", "PNG or JPEG"),
    (body(image=encoded_file(np.zeros((4, 4), np.uint8), "PNG")), "4x4 L", "RGB"),
    (body(image=encoded_file(FRAME, "PNG")[:80]), "image 'front'", "whole PNG or JPEG"),
    (body(state=[1.0, "a"]), "items that are not numbers", "finite numbers"),
    (body(state=array((2, 2), "f4")), "shape (2, 2)", "finite numbers"),
    (body(state=[1e300]), "1e+300", "finite numbers"),
    (body(state=array((2,), "b1")), "bool", "finite numbers"),
    (body(key=[-1]), "key [-1]", "2**63-1"),
    (body(unnorm_key="bridge_orig"), "unnorm_key 'bridge_orig'", "one of ['other', 'toy']"),
    (body(unnorm_key="other"), "unnorm_key 'other'", "started with"),
    (body(encoded="{}"), "the keys ['encoded', 'image', 'instruction']", 'only "encoded"'),
    ({"encoded": "{"}, '"encoded" that is not JSON', "a JSON object"),
    (b"not json", "the body that is not JSON", "a JSON object"),
    (b"\xff\xfe", "the body that is not JSON", "a JSON object"),
    (b"[1]", "the body of type list", "a JSON object"),
    (b"[" * 100_000, "the body that is not JSON", "a JSON object"),
]


@pytest.mark.parametrize(("request_body", "got", "expected"), REFUSED)
def test_act_refuses_with_got_expected_fix(url: str, request_body: object, got: str, expected: str) -> None:
    status, reply = ask(url, "/act", request_body)
    assert status == 400 and set(reply) == {"error"}
    assert got in reply["error"]["got"] and expected in reply["error"]["expected"] and reply["error"]["fix"]


@pytest.mark.parametrize(
    ("request_body", "got", "expected"),
    [
        (typed(instruction=None), "no instruction", "in words"),
        (typed(key=[1.5]), "body.key.0: 1.5", "valid integer"),
        (typed(key=["1"]), "body.key.0: 1", "valid integer"),
        (typed(state=[True]), "body.state", "valid"),
        (typed(speed=1), "body.speed", "Extra inputs are not permitted"),
        (body(), "body.image", "Extra inputs are not permitted"),
        ({"observations": []}, "body.observations", "at least 1 item"),
        ({"observations": [{"images": {}}]}, "body.observations.0.instruction", "Field required"),
        ({"observations": [typed()], "instruction": "go"}, "observations and instruction", "either"),
        (typed(unnorm_key="nope"), "unnorm_key 'nope'", "one of"),
        (b"{", "body", "JSON decode error"),
    ],
)
def test_v1_act_refuses_with_got_expected_fix(url: str, request_body: object, got: str, expected: str) -> None:
    status, reply = ask(url, "/v1/act", request_body)
    assert status == 400 and set(reply["error"]) == {"got", "expected", "fix"}
    assert got in reply["error"]["got"] and expected in reply["error"]["expected"]
    assert len(json.dumps(reply)) < 1000


def test_missing_camera_and_state(two_cameras: str) -> None:
    front = {"front": wire.encode(FRAME)}
    status, reply = ask(two_cameras, "/v1/act", {"images": front, "instruction": "go", "state": [0, 0]})
    assert status == 400 and reply["error"]["fix"] == "send wrist"
    both = {**front, "wrist": wire.encode(FRAME)}
    status, reply = ask(two_cameras, "/v1/act", {"images": both, "instruction": "go"})
    assert status == 400 and reply["error"] == {
        "got": "no state", "expected": "2 finite numbers", "fix": "send the robot's state"}  # fmt: skip
    status, reply = ask(two_cameras, "/act", body(state=[0, 0]))
    assert status == 400 and reply["error"]["got"] == "1 unnamed image(s)"


def test_undecodable_output_is_502_and_never_an_action() -> None:
    with running(make_app(FakePolicy())) as url:
        for instruction in ("undecodable", "raise undecodable"):
            status, reply = ask(url, "/act", body(instruction=instruction))
            assert status == 502 and reply["error"]["undecodable"] is True and "do not move" in reply["error"]["fix"]
        status, reply = ask(url, "/v1/act", typed(instruction="undecodable"))
        assert status == 200 and reply["ok"] is False and reply["actions"] is None
        assert reply["token_ids"] == list(range(H * D)) and reply["logprobs"] is None
        assert ask(url, "/health")[1]["undecodable"] == 3


def test_a_crash_is_500_with_the_id_of_the_logged_traceback(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "vla.serve"):
        status, reply = ask(url, "/act", body(instruction="crash"))
    assert status == 500 and "secret" not in json.dumps(reply) and "RuntimeError" in reply["error"]["got"]
    assert reply["error"]["id"] in caplog.text and "secret detail" in caplog.text
    assert ask(url, "/act", body())[0] == 200


def test_the_policys_own_refusal_is_400(url: str) -> None:
    status, reply = ask(url, "/act", body(instruction="be refused"))
    assert status == 400
    assert reply["error"] == {"got": "a bad row", "expected": "a good row", "fix": "send a good row"}


def test_unknown_path_and_method(url: str) -> None:
    status, reply = ask(url, "/predict", body())
    assert status == 404 and "POST /predict" in reply["error"]["got"] and "POST /act" in reply["error"]["expected"]
    status, reply = ask(url, "/act")
    assert status == 405 and "GET /act" in reply["error"]["got"]


@pytest.mark.parametrize("n_bytes", [2**20 + 1, 5 * 2**20])
def test_a_body_too_large_is_413(url: str, n_bytes: int) -> None:
    status, reply = ask(url, "/act", b" " * n_bytes)
    assert status == 413 and reply["error"]["expected"] == "at most 1 MiB" and "--max-body-mb" in reply["error"]["fix"]


def test_api_key() -> None:
    with running(make_app(FakePolicy(), api_key="s3cret")) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            status, reply = ask(url, "/act", body(), headers)
            assert status == 401 and "Authorization: Bearer" in reply["error"]["expected"]
            assert ask(url, "/metadata", headers=headers)[0] == 401
        assert ask(url, "/health")[0] == 200
        assert ask(url, "/act", body(), {"Authorization": "Bearer s3cret"})[0] == 200


def test_health_metadata_metrics_and_docs() -> None:
    with running(make_app(FakePolicy())) as url:
        assert ask(url, "/metrics")[1]["latency_ms"] == {"p50": None, "p90": None, "p99": None}
        ask(url, "/act", body())
        ask(url, "/act", body(instruction=None))
        health = ask(url, "/health")[1]
        assert health["ready"] is True and health["requests"] == 2 and health["errors"] == 1
        metrics = ask(url, "/metrics")[1]
        assert 0 < metrics["latency_ms"]["p50"] <= metrics["latency_ms"]["p99"] and metrics["mean_batch"] == 1
        metadata = ask(url, "/metadata")[1]
        assert metadata["action_dim"] == D and metadata["quantization"] == "none" and metadata["scale"] == 0.5
        assert metadata["versions"]["numpy"] == np.__version__
        schemas = ask(url, "/openapi.json")[1]["components"]["schemas"]
        assert {"ActRequest", "ActReply", "BatchReply"} <= set(schemas)


def test_concurrent_requests_share_calls_and_a_bad_row_fails_alone() -> None:
    policy = FakePolicy(wait_s=0.05)
    answers: dict[int, tuple[int, object]] = {}
    with running(make_app(policy, max_batch=8)) as url:

        def one(i: int) -> None:
            instruction = "be refused" if i == 3 else "go" * (i + 1)
            answers[i] = ask(url, "/act", body(instruction=instruction))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers.pop(3)[0] == 400
        for i, (status, reply) in answers.items():
            assert status == 200
            expected = expected_actions(Observation({"front": FRAME}, None, "go" * (i + 1)))[0]
            np.testing.assert_array_equal(wire.decode(reply), expected)
        assert 1 < max(policy.batch_sizes) <= 8
        assert ask(url, "/metrics")[1]["mean_batch"] > 1


def test_too_many_waiting_is_503() -> None:
    with running(make_app(FakePolicy(wait_s=0.2), max_batch=1, max_waiting=1, batch_window_ms=0.0)) as url:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(ask(url, "/act", body())[0])) for _ in range(5)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        assert ask(url, "/health")[0] == 200  # the event loop is free while the policy works
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 503}


def test_port_in_use_is_one_clear_error_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(VlaError, match=f"got port {port}, which is in use on 127.0.0.1; .* pass --port {port + 1}"):
            run(Settings(policy=tmp_path / "missing", port=port))


def test_a_socket_without_nagles_delay() -> None:
    with reserve_port("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlaError, match="got port 70000"):
        Settings(policy=tmp_path, port=70000)
    with pytest.raises(VlaError, match="max_batch 0"):
        Settings(policy=tmp_path, max_batch=0)
    with pytest.raises(VlaError, match="got host 'no such host'"):
        run(Settings(policy=tmp_path, host="no such host"))
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    with pytest.raises(VlaError, match="no environment variable ABSENT_KEY"):
        run(Settings(policy=tmp_path, port=0, api_key_env="ABSENT_KEY"))


def test_flags_of_a_server_process() -> None:
    settings = Settings(policy=Path("p q"), port=1, quantization="int8", batch_window_ms=0.5, stop_with_stdin=True)
    assert flags(settings) == ["--policy", "p q", "--port", "1", "--quantization", "int8", "--batch-window-ms", "0.5",
                               "--stop-with-stdin"]  # fmt: skip


def test_a_server_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = ServerProcess(Settings(policy=tmp_path / "nowhere", port=port), tmp_path / "server.log")
        with pytest.raises(VlaError, match=f"(?s)exited with code 2: .*got port {port}, which is in use"):
            process.start()


PROGRAM = """
import sys, types
from pathlib import Path
from serving import FakePolicy
sys.modules["vla.policy"] = module = types.ModuleType("vla.policy")  # the real one imports torch
module.load_policy = lambda path, **options: FakePolicy()
from vla.serve.server import Settings, run
run(Settings(policy=Path("toy"), port=int(sys.argv[1]), stop_with_stdin=True))
"""


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGINT", "end of input"])
def test_the_program_serves_and_stops_cleanly(ending: str) -> None:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment)
    assert process.stdin is not None
    with PolicyClient(f"http://127.0.0.1:{port}") as client:
        client.wait_until_ready(60.0)
        assert client.act([{"images": {"front": FRAME}, "instruction": "pick up the cup"}])[0].ok
    if ending != "end of input":
        process.send_signal(signal.Signals[ending])
        process.wait(20)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert f"serving toy at http://127.0.0.1:{port}" in out and "curl" in out and "Traceback" not in errors
