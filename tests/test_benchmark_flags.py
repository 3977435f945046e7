"""`python -m benchmarks.NAME --help`: each flag's help is the line under its field, not the one under the field before."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = [
    path
    for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
    if "class Settings" in path.read_text()
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstrings_not_comments_explain_the_fields(path):
    source = path.read_text(encoding="utf-8")
    settings = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Settings")
    for k, node in enumerate(settings.body):
        if isinstance(node, ast.AnnAssign):
            below = settings.body[k + 1]
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), ast.unparse(node)
    lines = source.splitlines()[settings.lineno : settings.end_lineno]
    assert not [line for line in lines if line.strip().startswith("#")]
