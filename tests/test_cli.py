"""The command line: names, presets, exit codes and messages; then every real program's flags."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import Any

import pytest

from vla import cli
from vla.types import VlaError, problem


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    """How many."""
    fail: str = ""


@pytest.fixture
def fake_program(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """A program `vla fake`; the settings it was run with are appended to the list."""
    ran: list[Settings] = []

    def run(settings: Settings) -> None:
        ran.append(settings)
        if settings.fail == "user":
            raise problem("3 cameras", "2", "drop one")
        if settings.fail == "interrupt":
            raise KeyboardInterrupt
        if settings.fail == "bug":
            raise ZeroDivisionError

    module = types.ModuleType("fake_program")
    module.__dict__.update(Settings=Settings, run=run, PRESETS={"quick": Settings(steps=1), "other": object()})
    monkeypatch.setitem(sys.modules, "fake_program", module)
    monkeypatch.setitem(cli.PROGRAMS, "fake", cli.Program("fake_program", "does nothing"))
    return ran


def test_flags_and_presets(fake_program: list[Settings]) -> None:
    assert cli.main(["fake"]) == 0
    assert cli.main(["fake", "--steps", "3"]) == 0
    assert cli.main(["fake", "quick"]) == 0
    assert cli.main(["fake", "quick", "--fail", ""]) == 0
    assert fake_program == [Settings(10), Settings(3), Settings(1), Settings(1)]


def test_a_users_mistake_is_one_line_and_exit_code_2(
    fake_program: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLA_DEBUG", raising=False)
    assert cli.main(["fake", "--fail", "user"]) == 2
    assert capsys.readouterr().err == "error: got 3 cameras; expected 2; fix: drop one\n"
    monkeypatch.setenv("VLA_DEBUG", "1")
    with pytest.raises(VlaError, match="got 3 cameras"):
        cli.main(["fake", "--fail", "user"])


def test_our_own_bugs_keep_their_traceback(fake_program: list[Settings]) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake", "--fail", "bug"])


def test_an_interrupt_says_how_to_continue(fake_program: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--fail", "interrupt"]) == 130
    assert "interrupted; to continue, run the same command again" in capsys.readouterr().err


def test_a_program_that_begins_anew_does_not_promise_to_continue(
    fake_program: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.PROGRAMS, "fake", cli.Program("fake_program", "does nothing", begins_anew=True))
    assert cli.main(["fake", "--fail", "interrupt"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; run the same command again\n"
    anew = {name for name, program in cli.PROGRAMS.items() if program.begins_anew}
    assert {"tokenizer fit", "data check"} <= anew
    assert not anew & {"data convert", "data filter", "data collect", "finetune", "rl", "eval", "demo", "pretrain"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetun"], r"got program 'finetun'; expected one of demo, .*did you mean `vla finetune`\?"),
        (["zzz"], r"got program 'zzz'; .*fix: vla --help"),
        (["fake", "quik"], r"got preset 'quik'; expected one of quick; fix: did you mean `vla fake quick`\?"),
        (["data", "stat"], r"got program 'data stat'; .*did you mean `vla data stats`\?"),
        (["data"], r"got program 'data'; expected one of data collect"),
    ],
)
def test_unknown_names_list_the_nearest(
    fake_program: list[Settings], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VlaError, match=message):
        cli.parse(argv)
    assert cli.main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert fake_program == []


def test_a_program_with_a_resume_flag_is_continued_with_it(
    fake_program: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Resumable(Settings):
        resume: bool = False

    monkeypatch.setattr(sys.modules["fake_program"], "Settings", Resumable)
    assert cli.main(["fake", "--fail", "interrupt"]) == 130
    assert "run the same command again with --resume" in capsys.readouterr().err


def test_an_unknown_flag_exits_with_2(fake_program: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--stepz", "3"]) == 2
    assert "--stepz" in capsys.readouterr().err
    assert fake_program == []


def test_help_and_version(fake_program: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    assert "vla finetune" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "vla-toolkit 0.1.0\n"
    assert cli.main(["fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert "quick" in out and "--steps" in out and "How many." in out
    assert cli.main(["data", "--help"]) == 0
    assert "vla data stats" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from vla import cli
cli.main(["--help"])
assert cli.main(["finetun"]) == 2
print(sorted({"torch", "transformers", "tyro", "fastapi"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_programs_that_need_an_environment_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune/` may not import `eval/`, nor `eval/` `serve/`: the command line joins them."""
    got: dict[str, Any] = {}
    suites = types.ModuleType("vla.eval.suites")
    suites.__dict__["get_suite"] = lambda name, tasks, expert=False: (name, tasks) + (expert,) * expert
    remote = types.ModuleType("vla.serve.remote_policy")
    remote.__dict__["RemotePolicy"] = lambda url: f"remote {url}"
    monkeypatch.setitem(sys.modules, "vla.eval.suites", suites)
    monkeypatch.setitem(sys.modules, "vla.serve.remote_policy", remote)

    def run(settings: Any, suite: Any = None, policy: Any = None) -> None:
        got.update(suite=suite, policy=policy)

    settings = types.SimpleNamespace(suite="metaworld", tasks=("push",), policy="http://localhost:8000", dry_run=False)
    cli._CALLS["suite"](run, settings)
    assert got == {"suite": ("metaworld", ("push",)), "policy": None}
    cli._CALLS["expert"](run, settings)
    assert got["suite"] == ("metaworld", ("push",), True)
    cli._CALLS["policy"](run, settings)
    assert got["policy"] == "remote http://localhost:8000"
    settings.dry_run = True
    cli._CALLS["policy"](run, settings)
    assert got["policy"] is None, "a dry run asks no server"
    settings.policy, settings.dry_run = "runs/policy", False
    cli._CALLS["policy"](run, settings)
    assert got["policy"] is None


def fields_without_help(settings_type: type) -> list[str]:
    """Fields of a dataclass that no docstring follows."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings_type))).body
    assert isinstance(definition, ast.ClassDef)
    following = zip(definition.body, [*definition.body[1:], None], strict=True)
    return [
        ast.unparse(field.target)
        for field, after in following
        if isinstance(field, ast.AnnAssign)
        and not (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
    ]


@pytest.mark.parametrize("name", sorted(cli.PROGRAMS))
def test_every_program_builds_its_flags_and_presets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = cli.PROGRAMS[name]
    module = importlib.import_module(program.module)
    settings_type = getattr(module, program.settings)
    assert callable(getattr(module, program.run))
    assert fields_without_help(settings_type) == [], "write a docstring, not a comment, under each field"
    assert cli.main([*name.split(), "--help"]) == 0
    assert "usage: vla" in capsys.readouterr().out
    for preset, settings in vars(module).get("PRESETS", {}).items():
        if isinstance(settings, settings_type):
            assert cli.parse([*name.split(), preset])[1] == settings
