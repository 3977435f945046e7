"""The four root folders are sub-packages of `vla`, and Hugging Face's `tokenizers` stays importable beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tokenizers", "finetune", "serve", "eval")

PROBE = """
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast
from vla.tokenizers.uniform import UniformTokenizer

def test_both_are_there():
    assert tokenizers.Tokenizer.__module__.startswith("tokenizers")
    assert UniformTokenizer.__module__ == "vla.tokenizers.uniform"
    assert PreTrainedTokenizerFast is not None

if __name__ == "__main__":
    test_both_are_there()
    print("both are there")
"""

LAUNCHES = {
    "python -m": ["-m", "launch_probe"],
    "python -m pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "PROBE_FILE"],
    "accelerate launch -m": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "launch_probe"],
    "torchrun -m": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "launch_probe"],
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_root_folder_is_linked_and_never_a_regular_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow the package of that name on the path"
    link = ROOT / "vla" / folder
    assert link.is_symlink(), "vla/ must hold a link, not a copy: was the checkout made without symlink support?"
    assert os.readlink(link) == f"../{folder}"


@pytest.mark.parametrize("launch", LAUNCHES)
def test_transformers_imports_from_the_repository_root(launch: str, tmp_path: Path) -> None:
    probe = tmp_path / "launch_probe.py"
    probe.write_text(PROBE)
    arguments = [str(probe) if a == "PROBE_FILE" else a for a in LAUNCHES[launch]]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both are there" in done.stdout or "1 passed" in done.stdout
