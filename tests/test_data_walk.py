"""Walks through the README's "## Data" with its own commands, on the fake suite's demonstrations."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from training import fake_dataset

from vla import cli
from vla.finetune.data.open_source import open_source
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.schemes import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def data_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)^```", text[text.index("## Data") :], re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def test_the_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dataset(tmp_path).rename(tmp_path / "windows")
    (tmp_path / "data").mkdir()
    (tmp_path / "windows").rename(tmp_path / "data" / "windows")
    monkeypatch.chdir(tmp_path)
    for command in data_commands():
        short = ["--steps", "20"] if "compare" in command else []  # of the codecs that are trained
        assert cli.main([*shlex.split(command)[1:], *short]) == 0, command
    source, cached, kept = (open_source(f"data/windows{suffix}") for suffix in ("", "-cache", "-kept"))
    assert len(cached) == len(source) and 0 < len(kept) <= len(source)
    assert len(json.loads(Path("nearest.json").read_text())["kept"]) == 2
    assert Path("episode.html").stat().st_size > 1000 and Path("compare.png").stat().st_size > 1000
    assert isinstance(load_tokenizer(Path("tokenizers/windows-fast")), FastTokenizer)
