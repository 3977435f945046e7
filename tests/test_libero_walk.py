"""The README's LIBERO commands on the real simulator, made short: one task, one episode."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla.finetune.formats.lerobot_reader import LeRobotReader

pytestmark = pytest.mark.libero

ROOT = Path(__file__).resolve().parents[1]
TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
SHORT = {
    "data collect": f"--tasks {TASK} --episodes-per-task 1 --processes 1",
    "eval replay": "--episodes 1 --workers 1 --out replay.json",
    "eval": f"--tasks {TASK} --episodes-per-task 1 --workers 1 --videos-per-task 1 --video-every-steps 8",
}


def libero_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## LIBERO\n.*?^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line for line in block[1].splitlines() if line.startswith("vla ")]


def test_the_commands_run_one_after_another(tmp_path: Path) -> None:
    pytest.importorskip("libero", reason="needs the [libero] extra")
    for command in libero_commands():
        words = shlex.split(command)[1:]
        name = next(n for n in (" ".join(words[:2]), words[0]) if n in SHORT)
        done = subprocess.run(
            [sys.executable, "-m", "vla.cli", *words, *shlex.split(SHORT[name])], cwd=tmp_path,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    episode = LeRobotReader(tmp_path / "data/libero").episode(0)
    assert episode.steps[0].action.shape == (7,) and episode.steps[-1].success
    images = episode.steps[0].observation.images
    assert set(images) == {"agentview", "wrist"}
    for image in images.values():
        assert image.shape == (256, 256, 3) and np.std(image) > 20, "a black or flat picture"

    result = json.loads((tmp_path / "runs/libero-expert/result.json").read_text())
    assert result["tasks"][TASK]["successes"] == 1, "the expert solves the first benchmark state"
    assert list((tmp_path / "runs/libero-expert/videos").glob("*success.mp4"))
    replay = json.loads((tmp_path / "replay.json").read_text())
    assert replay["tasks"][TASK]["successes"] == 1, "256 bins lose nothing that matters here"
