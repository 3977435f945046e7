"""Walks through the README's "Stage by stage" with its own commands, made short by a few flags."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="needs the [metaworld] extra")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# What is added to each command so that it takes seconds.
SHORT = {
    "data collect": "--episodes-per-task 2",
    "data inspect": "",
    "data check": "",
    "finetune": "--steps 2 --batch-size 2 --holdout-episodes 1",
    "eval": "--episodes-per-task 1 --workers 1",
    "eval compare": "",
    "doctor": "--frames 4 --resets 1 --replays 1",
    "rl": "--iterations 1 --groups 1 --max-groups 1 --group-size 2 --updates 1 --workers 1",
    "merge": "",
    "serve": "",
}


def stage_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Stage by stage") :]
    block = re.search(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line for line in block[1].splitlines() if line.strip()]


def shortened(command: str) -> list[str]:
    """`vla eval --policy X` -> the arguments after `vla`, with the flags of `SHORT`."""
    words = shlex.split(command)[1:]
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in SHORT)
    return [*words, *shlex.split(SHORT[name])]


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_the_stages_run_one_after_another(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    vla = [sys.executable, "-m", "vla.cli"]
    server: subprocess.Popen[bytes] | None = None
    log = tmp_path / "server.log"
    try:
        for command in stage_commands():
            if command.startswith("vla serve"):
                with open(log, "wb") as out:
                    server = subprocess.Popen(
                        [*vla, *shortened(command)], cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT
                    )
                wait_until_healthy("http://127.0.0.1:8000", server, log)
                continue
            done = subprocess.run(
                [*vla, *shortened(command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
    assert (tmp_path / "runs/sft/policy/policy.json").exists()
    assert (tmp_path / "runs/merged/model").is_dir()
    assert list((tmp_path / "runs/eval-served").glob("*.html"))
