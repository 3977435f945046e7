"""Imports run one way: types <- tokenizers <- policy <- finetune, serve, eval <- programs that join them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vla

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tokenizers", "finetune", "serve", "eval")

FOUNDATION = {"vla.types", "vla.files", "vla.torchvision_shim"}
# `vla/__init__.py` names what users need most; the others join the parts.
JOINING = (
    "vla",
    "vla.cli",
    "vla.demo",
    "vla.card_program",
    "vla.doctor",
    "vla.pretrain",
    "vla.replay_program",
)

ALLOWED = {
    "foundation": {"foundation"},
    "tokenizers": {"foundation", "tokenizers"},
    "policy": {"foundation", "tokenizers", "policy"},
    "finetune": {"foundation", "tokenizers", "policy", "finetune"},
    "serve": {"foundation", "tokenizers", "policy", "serve"},
    "eval": {"foundation", "tokenizers", "policy", "eval"},
    "joining": {"foundation", "tokenizers", "policy", "finetune", "serve", "eval", "joining"},
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    if module in FOUNDATION:
        return "foundation"
    if len(parts) > 1 and parts[1] in PARTS:
        return parts[1]
    if module == "vla" or any(module == j or module.startswith((f"{j}.", f"{j}_")) for j in JOINING[1:]):
        return "joining"
    return "policy"


def source_files() -> dict[str, Path]:
    """Module name -> file, for all our code; links are not followed."""
    found = {}
    for top in ("vla", *PARTS):
        for folder, _, names in os.walk(ROOT / top):
            for name in names:
                path = Path(folder) / name
                if path.suffix != ".py":
                    continue
                parts = list(path.relative_to(ROOT).with_suffix("").parts)
                if parts[0] != "vla":
                    parts.insert(0, "vla")
                if parts[-1] == "__init__":
                    parts.pop()
                found[".".join(parts)] = path
    return found


FILES = source_files()


def imports_of(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known or full in {f"vla.{p}" for p in PARTS} else base


def parse(module: str) -> ast.AST:
    return ast.parse(FILES[module].read_text(encoding="utf-8"), filename=str(FILES[module]))


def edges(module: str) -> set[str]:
    """Our own modules that `module` imports."""
    return {name for name in imports_of(parse(module), set(FILES)) if name == "vla" or name.startswith("vla.")}


def wrong_edges(module: str, imported: set[str]) -> list[str]:
    mine = layer_of(module)
    return sorted(f"{module} ({mine}) -> {m} ({layer_of(m)})" for m in imported if layer_of(m) not in ALLOWED[mine])


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_one_way(module: str) -> None:
    assert wrong_edges(module, edges(module)) == []


def test_no_modules_import_each_other() -> None:
    graph = {module: edges(module) & set(FILES) - {module} for module in FILES if module != "vla"}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(m for m in FILES if layer_of(m) in ("foundation", "tokenizers")))
def test_the_lowest_layers_need_little(module: str) -> None:
    """numpy and Hugging Face's tokenizers; torch is only imported by the shim, inside the hook, and where the learned
    codecs are trained."""
    extra = {"torch"} if module == "vla.torchvision_shim" or module.endswith("_training") else set()
    extra |= {"safetensors"} if module == "vla.tokenizers.learned" else set()
    allowed = set(sys.stdlib_module_names) | {"vla", "numpy", "tokenizers", "__future__"} | extra
    outside = {name.split(".")[0] for name in imports_of(parse(module), set(FILES))} - allowed
    assert outside == set()


def test_the_walk_sees_hidden_imports() -> None:
    code = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from vla.eval.run import run
def late():
    from vla import serve
    import vla.finetune.rl
"""
    imported = set(imports_of(ast.parse(code), set(FILES) | {"vla.eval.run"}))
    assert {"vla.eval.run", "vla.serve", "vla.finetune.rl"} <= imported
    assert len(wrong_edges("vla.tokenizers.uniform", {"vla.eval.run", "vla.serve", "vla.finetune.rl"})) == 3
    assert wrong_edges("vla.eval.run", {"vla.finetune.rl"}) == ["vla.eval.run (eval) -> vla.finetune.rl (finetune)"]
    assert wrong_edges("vla.demo_stages", {"vla.finetune.rl"}) == []


def test_the_names_offered_by_vla_resolve() -> None:
    for name in vla.__all__:
        assert getattr(vla, name) is not None
        assert name in dir(vla)
    with pytest.raises(AttributeError, match="'vla' has no attribute 'nonsense'"):
        _ = vla.nonsense
