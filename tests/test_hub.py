"""The real `huggingface_hub` against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import numpy as np
import pytest

from vla.finetune.formats.hub import HubAddress, open_hub, parse_address
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.types import VlaError

FIXTURES = Path(__file__).parent / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the folders of `root`, OWNER/NAME, as dataset repositories whose main branch is at COMMIT."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.gets: Counter[str] = Counter()
        """File name -> how many GET requests there were."""
        self.private: set[str] = set()
        self.cut: dict[str, int] = {}
        """File name -> how many more times the connection breaks in the middle of it."""
        self.ranges: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def send(self, status: int, body: bytes, headers: dict[str, str], head: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def answer(self, head: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self.about("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        repo, revision, name = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
        if self.refused(repo, revision):
            return None
        path = self.server.root / repo / name
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, head)
        whole = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "Accept-Ranges": "bytes"}
        if head:
            headers["Content-Length"] = str(len(whole))
            return self.send(200, b"", headers, head=True)
        self.server.gets[name] += 1
        start = 0
        if asked := self.headers.get("Range"):
            self.server.ranges.append(f"{name} {asked}")
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        body = whole[start:]
        if self.server.cut.get(name, 0) > 0:
            self.server.cut[name] -= 1
            headers["Content-Length"] = str(len(body))
            self.send(206 if start else 200, body[: len(body) // 2], headers)
            self.close_connection = True
            return None
        return self.send(206 if start else 200, body, headers)

    def refused(self, repo: str, revision: str) -> bool:
        if repo in self.server.private or not (self.server.root / repo).is_dir():
            self.send(401, b'{"error": "Invalid username or password."}', {"X-Error-Message": "Invalid username"})
        elif revision not in ("main", "v3.0", COMMIT):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def about(self, repo: str, revision: str) -> None:
        if self.refused(repo, revision):
            return
        root = self.server.root / repo
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        value = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False,
                 "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}  # fmt: skip
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextlib.contextmanager
def running(server, monkeypatch, cache: Path):
    """While inside, `server` is the Hub and `cache` holds what is downloaded from it."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest sets it
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    for kind in ("v21_image", "v21_video", "v3_video", "v3_image"):
        shutil.copytree(FIXTURES / f"lerobot_{kind}", tmp_path / "hub/toy" / kind)
    server = Hub(tmp_path / "hub")
    with running(server, monkeypatch, tmp_path / "cache"):
        yield server


def cached_blobs(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*"))


def test_addresses():
    assert parse_address("a/b") == HubAddress("a/b")
    assert parse_address("hf://datasets/a/b-c@v3.0/x/y/") == HubAddress("a/b-c", "v3.0", "x/y")
    assert str(parse_address("a/b@main/c")) == "hf://datasets/a/b@main/c"
    assert (parse_address("a/b").name, parse_address("a/b/c/d").name) == ("b", "d")
    for text in ("b", "hf://a/b", "hf://models/a/b", "a/b/../c", "a/b@", ""):
        with pytest.raises(VlaError, match=r"expected hf://datasets/OWNER/NAME\[@REVISION\]"):
            parse_address(text)


@pytest.mark.parametrize("address", ["toy/v3_video", "hf://datasets/toy/v3_video@v3.0"])
def test_only_what_is_needed_is_downloaded(server, address):
    local = LeRobotReader(FIXTURES / "lerobot_v3_video")
    reader = open_hub(address, name="toy")
    assert set(server.gets) == {"meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"}
    assert (reader.name, len(reader), reader.cameras) == ("toy", 39, local.cameras)
    np.testing.assert_array_equal(reader.actions(), local.actions())
    assert not any(name.endswith(".mp4") for name in server.gets)
    np.testing.assert_array_equal(reader.images(30, ["image"])["image"], local.images(30, ["image"])["image"])
    assert [name for name in server.gets if name.endswith(".mp4")] == [
        "videos/observation.images.image/chunk-000/file-000.mp4"
    ]
    before = dict(server.gets)
    again = open_hub(address)  # everything is in the cache
    np.testing.assert_array_equal(again.images(30, ["image"])["image"], reader.images(30, ["image"])["image"])
    assert dict(server.gets) == before and again.name == "v3_video"


def test_pickled_readers_download_too(server):
    reader = pickle.loads(pickle.dumps(open_hub("toy/v21_video")))
    local = LeRobotReader(FIXTURES / "lerobot_v21_video")
    for i in (23, 0):
        np.testing.assert_array_equal(reader.images(i)["wrist"], local.images(i)["wrist"])
    assert server.gets["videos/chunk-000/observation.images.wrist/episode_000001.mp4"] == 0


def test_folder_of_a_repository(server):
    shutil.copytree(FIXTURES / "lerobot_v21_image", server.root / "toy/many/arms/left")
    reader = open_hub("toy/many/arms/left")
    assert reader.name == "left" and len(reader) == 24
    reader.images(0)
    with pytest.raises(VlaError, match=r"no file in hf://datasets/toy/many@main/legs"):
        open_hub("toy/many/legs")
    with pytest.raises(VlaError, match=r"toy/many@main with arms/left/data.*expected meta/info.json \(LeRobot\)"):
        open_hub("toy/many")


def test_offline(server, monkeypatch):
    local = LeRobotReader(FIXTURES / "lerobot_v21_image")
    open_hub("toy/v21_image").images(8)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reader = open_hub("toy/v21_image")  # what was downloaded is still there
    np.testing.assert_array_equal(reader.images(8, ["top"])["top"], local.images(8, ["top"])["top"])
    with pytest.raises(VlaError, match=r"v3_video@main is not in the cache and the Hub cannot be reached .*expected a connection to http.*fix: connect"):  # fmt: skip
        open_hub("toy/v3_video")


def test_file_that_was_not_downloaded_before_the_connection_was_lost(server, monkeypatch):
    reader = open_hub("toy/v3_video")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        VlaError, match=r"data/chunk-000/file-000.parquet of hf://datasets/toy/v3_video@main is not in the cache"
    ):
        reader.actions()


def test_refusals(server):
    server.private.add("toy/v3_image")
    for address in ("toy/v3_image", "toy/nothing"):
        with pytest.raises(VlaError, match=rf"no access to hf://datasets/{address}@main: .*hf auth login"):
            open_hub(address)
    with pytest.raises(VlaError, match=r"no revision 'v9'.*fix: correct what follows @"):
        open_hub("toy/v21_image@v9")


def test_missing_file(server):
    reader = open_hub("toy/v21_video")
    (server.root / "toy/v21_video/videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    with pytest.raises(VlaError, match=r"no videos/chunk-000/observation.images.top/episode_000001.mp4 of hf://datasets/toy/v21_video@main; .*incomplete"):  # fmt: skip
        reader.images(8, ["top"])
    reader.images(0, ["top"])


def test_broken_connection_is_taken_up_where_it_broke(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 65536)  # a block is kept or lost whole
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    name = "data/chunk-000/file-000.parquet"
    whole = (server.root / "toy/v3_image" / name).read_bytes()
    server.cut[name] = 2
    reader = open_hub("toy/v3_image")
    np.testing.assert_array_equal(reader.actions(), LeRobotReader(FIXTURES / "lerobot_v3_image").actions())
    first = len(whole) // 2 // 65536 * 65536
    second = first + (len(whole) - first) // 2 // 65536 * 65536
    assert server.gets[name] == 3 and server.ranges == [f"{name} bytes={first}-", f"{name} bytes={second}-"]


def test_connection_that_keeps_breaking(server, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    name = "data/chunk-000/file-000.parquet"
    reader = open_hub("toy/v3_image")
    server.cut[name] = 1000
    with pytest.raises(VlaError, match=r"data/chunk-000/file-000.parquet of .*the Hub cannot be reached .*peer closed"):
        reader.actions()
    assert not list((tmp_path / "cache").rglob("snapshots/**/data/**/*.parquet"))  # nothing half-written
    server.cut[name] = 0
    assert reader.actions().shape == (39, 7)
