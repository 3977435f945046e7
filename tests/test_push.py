"""Policies to and from the Hub: the real `huggingface_hub` against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import ModelCard
from test_hub import COMMIT, Answer, Hub, running
from test_policy import STATISTICS, make, observations

from vla import cli, merge, push
from vla.hub_policy import names_repository, policy_folder
from vla.policy import load_policy
from vla.types import VlaError


class ModelHub(Hub):
    """Serves the folders of `root`, OWNER/NAME, as model repositories, and takes uploads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.RequestHandlerClass = ModelAnswer
        self.token = "hf_right"
        self.blobs: dict[str, bytes] = {}
        self.posts: list[str] = []
        self.created: list[dict] = []
        self.cards: list[str] = []


class ModelAnswer(Answer):
    server: ModelHub  # type: ignore[assignment]

    def json(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def answer(self, head: bool) -> None:
        parts = self.parts
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if len(parts) > 4 and parts[4] == "tree":
                files = [] if self.refused(repo, revision) else self.tree(self.server.root / repo)
                return self.json(files) if (self.server.root / repo).is_dir() else None
            return self.about(repo, revision)
        self.path = "/datasets" + self.path  # the paths of datasets have one part more
        return super().answer(head)

    @staticmethod
    def tree(root: Path) -> list[dict]:
        return [
            {"type": "file", "path": p.relative_to(root).as_posix(), "size": p.stat().st_size, "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
            for p in sorted(root.rglob("*")) if p.is_file()
        ]  # fmt: skip

    def do_POST(self) -> None:
        body, parts = self.body, self.parts
        self.server.posts.append("/".join(parts))
        if parts == ["api", "validate-yaml"]:
            self.server.cards.append(json.loads(body)["content"])
            return self.json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.send(
                401, b'{"error": "Invalid username or password."}', {"X-Error-Message": "Invalid username or password."}
            )
        if parts == ["api", "repos", "create"]:
            value = json.loads(body)
            self.server.created.append(value)
            repo = f"{value['organization']}/{value['name']}"
            (self.server.root / repo).mkdir(parents=True, exist_ok=True)
            return self.json({"url": f"{self.server.address}/{repo}", "id": repo, "name": repo})
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = json.loads(body)["files"]
            return self.json({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        if parts[-3:] == ["lfs", "objects", "batch"]:
            wanted = [o for o in json.loads(body)["objects"]]
            return self.json({"transfer": "basic", "objects": [
                o if o["oid"] in self.server.blobs else {**o, "actions": {"upload": {"href": f"{self.server.address}/store/{o['oid']}"}}}
                for o in wanted
            ]})  # fmt: skip
        if parts[:2] == ["api", "models"] and parts[4] == "commit":
            return self.commit("/".join(parts[2:4]), body)
        return self.send(404, b"{}", {})

    def do_PUT(self) -> None:
        self.server.blobs[self.parts[-1]] = self.body
        self.server.posts.append("PUT")
        self.send(200, b"", {})

    def commit(self, repo: str, body: bytes) -> None:
        root = self.server.root / repo
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            path = root / value.get("path", "")
            if key == "deletedFile":
                path.unlink()
            elif key in ("file", "lfsFile"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    base64.b64decode(value["content"]) if key == "file" else self.server.blobs[value["oid"]]
                )
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        self.json({"success": True, "commitOid": COMMIT, "commitUrl": url})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    server = ModelHub(tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.chdir(tmp_path)
    with running(server, monkeypatch, tmp_path / "cache"):
        yield server


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    policy = make(folder / "base", "llava")
    policy.save(folder / "policy", stage="finetune", settings={})
    merge.run(merge.Settings(folder / "policy", folder / "merged", check=False))
    return folder


def test_up_and_down_again(hub, policies, tmp_path, capsys):
    assert cli.main(["push", str(policies / "merged"), "--repo", "me/toy", "--private"]) == 0
    assert hub.created[0] | {"name": "toy", "organization": "me", "visibility": "private"} == hub.created[0]
    local = {
        p.relative_to(policies / "merged").as_posix(): p.read_bytes()
        for p in (policies / "merged").rglob("*")
        if p.is_file()
    }
    there = {
        p.relative_to(hub.root / "me/toy").as_posix(): p.read_bytes()
        for p in (hub.root / "me/toy").rglob("*")
        if p.is_file()
    }
    assert there == local
    assert "names no licence" in capsys.readouterr().out
    assert hub.cards and "pipeline_tag: robotics" in hub.cards[0], "the Hub was asked whether the metadata is valid"
    (hub.root / "me/toy/evil.py").write_text("raise SystemExit")
    (hub.root / "me/toy/model/pytorch_model.bin").write_bytes(b"pickle")
    policy = load_policy("me/toy")
    for mine, theirs in zip(
        policy.act(observations()), load_policy(policies / "merged").act(observations()), strict=True
    ):
        assert np.array_equal(mine.actions, theirs.actions)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "policy.json" in fetched and not fetched & {"evil.py", "pytorch_model.bin"}
    assert policy_folder("hf://me/toy@main") == policy_folder(Path("hf://me/toy@main")) == policy_folder("me/toy")


def test_a_second_push_sends_only_what_is_new_and_clears_old_weights(hub, policies):
    push.run(push.Settings(policies / "merged", "me/toy"))
    assert hub.posts.count("PUT") == 1
    (hub.root / "me/toy/adapter").mkdir()
    (hub.root / "me/toy/adapter/adapter_model.safetensors").write_bytes(b"old")
    (hub.root / "me/toy/LICENSE").write_text("mine")
    push.run(push.Settings(policies / "merged", "me/toy"))
    assert hub.posts.count("PUT") == 1
    assert (
        not (hub.root / "me/toy/adapter/adapter_model.safetensors").exists() and (hub.root / "me/toy/LICENSE").exists()
    )


def test_dry_run_asks_nobody(hub, policies, capsys):
    push.run(push.Settings(policies / "merged", "me/toy", dry_run=True))
    shown = capsys.readouterr().out
    assert "model/model.safetensors" in shown and f"to {hub.address}/me/toy" in shown and not hub.posts and not hub.gets


def test_refusals(hub, policies, tmp_path, monkeypatch):
    with pytest.raises(VlaError, match="adapter weights on .*base, which only this machine has.*vla merge"):
        push.run(push.Settings(policies / "policy", "me/toy"))
    with pytest.raises(VlaError, match="--repo 'toy'; expected OWNER/NAME"):
        push.run(push.Settings(policies / "merged", "toy"))
    copy = tmp_path / "copy"
    shutil.copytree(policies / "merged", copy)
    (copy / "model" / "training_args.bin").write_bytes(b"x")
    with pytest.raises(VlaError, match="training_args.bin; expected files of a policy directory"):
        push.run(push.Settings(copy, "me/toy"))
    assert not hub.posts
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(VlaError, match="no right to write to me/toy: .*a token with write access.*hf auth login"):
        push.run(push.Settings(policies / "merged", "me/toy"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(VlaError, match="expected a connection to http"):
        push.run(push.Settings(policies / "merged", "me/toy"))


def test_policies_that_are_not_there(hub, tmp_path, monkeypatch):
    with pytest.raises(
        VlaError, match=r"me/nothing@main, which is no folder here, and no access to it on the Hub.*hf auth login"
    ):
        load_policy("me/nothing")
    (tmp_path / "runs").mkdir()
    assert not names_repository("runs/policcy") and not names_repository("./a/b") and not names_repository("a/b/c")
    with pytest.raises(VlaError, match="no policy.json in runs/policcy"):
        load_policy("runs/policcy")
    with pytest.raises(VlaError, match="address 'hf://x'; expected hf://OWNER/NAME"):
        load_policy("hf://x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VlaError, match=r"not in the cache, and the Hub cannot be reached.*check the path; or connect"):
        load_policy("me/elsewhere")


def test_eval_takes_the_address(hub, policies, tmp_path, capsys):
    push.run(push.Settings(policies / "merged", "me/toy"))
    code = cli.main(["eval", "--policy", "me/nothing", "--suite", "metaworld", "--out", str(tmp_path / "out")])
    assert code == 2 and "no access to it on the Hub" in capsys.readouterr().err
    assert sorted(STATISTICS) == load_policy("me/toy").metadata["unnorm_keys"]
    assert ModelCard.load(hub.root / "me/toy/README.md").data.library_name == "transformers"
