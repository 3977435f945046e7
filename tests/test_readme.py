"""Every command in the README is run: here, by another test, or by `.ci/run`. A new command needs a line in `COVERED_BY`."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vla import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Start of a command -> a file that runs it, and a piece of text in that file which does so.
COVERED_BY = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "pip install .": (".ci/run", "pip install --quiet"),
    "pip install '.[metaworld,bnb]'": ("Makefile", "dev,metaworld,bnb"),
    "vla data collect": ("tests/test_readme_walk.py", "data collect"),
    "vla data inspect": ("tests/test_readme_walk.py", "data inspect"),
    "vla data": ("tests/test_data_walk.py", "## Data"),
    "vla tokenizer": ("tests/test_data_walk.py", "## Data"),
    "vla finetune": ("tests/test_readme_walk.py", "finetune"),
    "pip install '.[libero]'": (".ci/run", "bnb,libero"),
    "vla data collect --suite libero_object": ("tests/test_libero_walk.py", "data collect"),
    "vla eval --suite libero_object": ("tests/test_libero_walk.py", "eval"),
    "vla eval replay": ("tests/test_libero_walk.py", "eval replay"),
    "vla eval compare": ("tests/test_readme_walk.py", "eval compare"),
    "vla doctor": ("tests/test_readme_walk.py", "doctor"),
    "vla eval": ("tests/test_readme_walk.py", "eval"),
    "vla rl": ("tests/test_readme_walk.py", "rl"),
    "vla merge": ("tests/test_readme_walk.py", "merge"),
    "vla serve": ("tests/test_readme_walk.py", "serve"),
}


def commands(language: str) -> list[str]:
    """The lines of all blocks marked with `language`, without comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("command", commands("bash"))
def test_a_command_is_run_somewhere(command: str) -> None:
    found = [start for start in COVERED_BY if command == start or command.startswith(start + " ")]
    assert found, f"no test or CI step runs {command!r}; add one, and a line to COVERED_BY"
    name, text = COVERED_BY[max(found, key=len)]
    assert text in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [c for c in commands("bash") if c.startswith("vla ")])
def test_the_flags_of_a_command_exist(command: str) -> None:
    program, settings = cli.parse(shlex.split(command)[1:])
    assert isinstance(settings, getattr(importlib.import_module(program.module), program.settings))


def test_python_blocks_compile_and_use_names_that_exist() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
    for name in re.findall(r"^from vla import (.*)$", "\n".join(blocks), re.MULTILINE):
        module = __import__("vla")
        assert all(hasattr(module, each.strip()) for each in name.split(","))


@pytest.mark.parametrize("page", ["README.md", "docs/how-to.md"])
def test_every_flag_that_is_named_exists(page: str) -> None:
    known = {"--config_file", "--num_processes", "--help", "--version", "--peer"}  # of accelerate, vla, a benchmark
    for program in cli.PROGRAMS.values():
        settings = getattr(importlib.import_module(program.module), program.settings)
        names = {field.name.rstrip("_").replace("_", "-") for field in dataclasses.fields(settings)}
        known |= {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text(encoding="utf-8")))
    assert named and named <= known, named - known


def test_paths_and_lengths() -> None:
    assert len(README.splitlines()) <= 250
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80
    for path in re.findall(r"`((?:vla|serve|eval|docs|benchmarks|tests|tokenizers|finetune)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), f"the README names {path}, which does not exist"
