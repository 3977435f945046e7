"""`vla demo`: its stages survive kill -9, and a folder belongs to one demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vla import demo
from vla.types import VlaError

QUICK = ["quick", "--tasks", "faucet-open", "--demos-per-task", "3", "--sft-steps", "8",
         "--rl-iterations", "2", "--eval-episodes-per-task", "1"]  # fmt: skip


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(replace(demo.Settings(), out=tmp_path / "demo", dry_run=True))
    assert not (tmp_path / "demo").exists()
    stages = [line.split(" about ")[0].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert stages[0] == "expert demonstrations" and stages[-1] == "report" and len(stages) == 8


def test_shares_of_time_add_up(tmp_path: Path) -> None:
    stages = demo.make_stages(replace(demo.Settings(), out=tmp_path))
    assert sum(stage.share for stage in stages) == pytest.approx(1.0)


def test_another_demo_in_the_folder_is_refused(tmp_path: Path) -> None:
    settings = replace(demo.Settings(), out=tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"tasks": ["reach"], "seed": 0}))
    with pytest.raises(VlaError, match=r"another demo in .*tasks \['reach'\] -> \['faucet-open'"):
        demo.run(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.slow
def test_killed_during_rl_it_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("metaworld", reason="needs the [metaworld] extra")
    out, log = tmp_path / "demo", tmp_path / "log"
    command = [sys.executable, "-m", "vla.cli", "demo", *QUICK, "--out", str(out)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True)

    first = start()
    deadline_s = time.monotonic() + 300
    while not (out / "rl" / "metrics.jsonl").exists():  # its first iteration is done, the second under way
        assert first.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {path: (path.stat().st_mtime_ns, path.read_bytes()) for name in ("demos", "sft/policy", "eval-sft")
            for path in (out / name).rglob("*") if path.suffix in (".safetensors", ".mp4", ".png", ".parquet", ".jsonl")}  # fmt: skip
    iteration = (out / "rl" / "metrics.jsonl").read_text().splitlines()[0]
    assert done and not (out / "report.html").exists()

    second = start()
    assert second.wait(timeout=300) == 0, log.read_text()
    assert (out / "rl" / "metrics.jsonl").read_text().splitlines()[0] == iteration
    assert {path.suffix for path in done} >= {".safetensors", ".mp4", ".parquet", ".jsonl"}
    for path, (changed_ns, content) in done.items():
        assert path.read_bytes() == content, path
        assert path.suffix not in (".safetensors", ".mp4") or path.stat().st_mtime_ns == changed_ns, (
            f"{path} made again"
        )
    assert "<table" in (out / "report.html").read_text()
    assert set(json.loads((out / "summary.json").read_text())["success"]) == {
        "after SFT", "after RL", "RL, quantized, over HTTP"
    }  # fmt: skip
