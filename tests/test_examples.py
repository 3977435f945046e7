"""The examples run as they say."""

import subprocess
import sys
from pathlib import Path

import pytest
from training import fake_dataset, sft_settings, tiny_backbone

from vla.finetune import sft

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_tokenize_actions():
    out = run("examples.tokenize_actions")
    assert "ids [[31999, 31872, 31744" in out and "ok [True]" in out and "array([False])" in out


@pytest.mark.slow
def test_finetune_and_act():
    assert "decoded: True" in run("examples.finetune_and_act")


def test_serve_and_query(tmp_path):
    fake_dataset(tmp_path, episodes_per_task=3)
    tiny_backbone(tmp_path)
    policy = sft.run(sft_settings(tmp_path, steps=2))
    out = run("examples.serve_and_query", str(policy))
    assert "serving run cameras ['front'] chunk 3 x 2" in out
