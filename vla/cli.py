"""The command line: `vla <program> [preset] [--flags]`.

Each program is a module with a frozen dataclass of settings and a function that runs them; `tyro` makes the flags from
the dataclass. A module is imported only when its program is asked for, so `vla --help` is instant.

Exit codes: 0 done; 2 a mistake the user can mend, in one line on stderr (`VLA_DEBUG=1` shows the traceback); 130
interrupted; 1 with a traceback is a bug of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vla import __version__
from vla.types import VlaError, problem


@dataclass(frozen=True)
class Program:
    """One entry of `PROGRAMS`."""

    module: str
    summary: str
    settings: str = "Settings"
    run: str = "run"
    needs: str = ""
    """What the command line supplies beside the settings, because the module's part may not import it: a key of `_CALLS`."""
    begins_anew: bool = False
    """Interrupted and started again, it does everything again: it keeps nothing to continue from."""
    has_words: bool = False
    """Its settings take words without a flag (`tyro.conf.Positional`), so that the first one is no preset."""


PROGRAMS = {
    "demo": Program("vla.demo", "the whole pipeline on a simulator: demonstrations, SFT, RL, serving, report"),
    "data collect": Program(
        "vla.finetune.data.data_program",
        "record a scripted expert's demonstrations",
        "CollectSettings",
        "run_collect",
        "expert",
    ),
    "data inspect": Program("vla.finetune.data.data_inspect", "what a dataset holds", begins_anew=True),
    "data stats": Program(
        "vla.finetune.data.data_program",
        "exact statistics of a dataset",
        "StatsSettings",
        "run_stats",
        begins_anew=True,
    ),
    "data check": Program(
        "vla.finetune.data.data_check", "what is wrong with a dataset: its files and its content", begins_anew=True
    ),
    "data convert": Program(
        "vla.finetune.data.data_convert", "any dataset to LeRobot v3.0 or the fast cache", has_words=True
    ),
    "data filter": Program("vla.finetune.data.data_filter", "the part of a dataset worth training on", has_words=True),
    "data retrieve": Program(
        "vla.finetune.data.data_retrieve", "the prior episodes nearest to a few demonstrations", begins_anew=True
    ),
    "data viz": Program("vla.finetune.data.data_viz", "one episode to look at", has_words=True, begins_anew=True),
    "data list": Program(
        "vla.finetune.data.data_list", "the Open X-Embodiment datasets and mixtures that have a name", begins_anew=True
    ),
    "tokenizer fit": Program(
        "vla.finetune.tokenizer_program",
        "fit an action tokenizer to a dataset",
        "FitSettings",
        "run_fit",
        has_words=True,
        begins_anew=True,
    ),
    "tokenizer compare": Program(
        "vla.finetune.tokenizer_program",
        "tokens, error, entropy and speed of every action-token scheme on a dataset",
        "CompareSettings",
        "run_compare",
        has_words=True,
        begins_anew=True,
    ),
    "finetune": Program("vla.finetune.sft", "supervised fine-tuning with LoRA", needs="eval suite"),
    "rl": Program("vla.finetune.rl", "RL post-training from sparse success", needs="suite"),
    "import": Program(
        "vla.import_policy", "a policy directory from an OpenVLA or OFT checkpoint", has_words=True, begins_anew=True
    ),
    "merge": Program("vla.merge", "merge an adapter into its base model", begins_anew=True),
    "card": Program(
        "vla.card_program", "write a policy's model card, with its figures", has_words=True, begins_anew=True
    ),
    "push": Program("vla.push", "a policy directory to the Hugging Face Hub", has_words=True, begins_anew=True),
    "serve": Program("vla.serve.server", "answer observations over HTTP", begins_anew=True),
    "eval": Program(
        "vla.eval.run", "success rates of a policy directory or an endpoint, with a report", needs="policy"
    ),
    "eval merge": Program(
        "vla.eval.merge", "put the shards of one evaluation together", has_words=True, begins_anew=True
    ),
    "eval compare": Program(
        "vla.eval.compare", "two evaluations on the same seeds: which is better", has_words=True, begins_anew=True
    ),
    "eval replay": Program(
        "vla.replay_program",
        "replay recorded actions through the action tokens: the upper bound they allow",
        begins_anew=True,
    ),
    "doctor": Program(
        "vla.doctor.program",
        "why a policy does worse than it should: one page of checks",
        has_words=True,
        begins_anew=True,
    ),
    "pretrain": Program("vla.pretrain.program", "make the built-in backbone anew"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _hush_libraries()
    again, continues = "run the same command again", False
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage())
            return 0
        if argv[0] == "--version":
            print(f"vla-toolkit {__version__}")
            return 0
        program, settings = parse(argv)
        continues = not program.begins_anew
        if any(field.name == "resume" for field in dataclasses.fields(settings)):
            again += " with --resume"
        call(program, settings)
        return 0
    except VlaError as error:
        if os.environ.get("VLA_DEBUG") == "1":
            raise
        print(_red(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {'to continue, ' if continues else ''}{again}", file=sys.stderr)
        return 130
    except SystemExit as exit_:  # tyro, after --help or a flag it does not know
        return exit_.code if isinstance(exit_.code, int) else 2


def usage() -> str:
    """The text of `vla --help`."""
    width = max(len(name) for name in PROGRAMS)
    lines = [f"  vla {name:<{width}}  {program.summary}" for name, program in PROGRAMS.items()]
    return "\n".join(
        ["usage: vla <program> [preset] [--flags]", "", *lines, "", "vla <program> --help lists presets and flags."]
    )


def parse(argv: Sequence[str]) -> tuple[Program, Any]:
    """The program that `argv` names and its settings; runs nothing.

    Raises `VlaError` for an unknown program or preset. tyro exits with 2 for flags it does not know.
    """
    name, rest = _split_program(argv)
    program = PROGRAMS[name]
    module = importlib.import_module(program.module)
    settings_type = getattr(module, program.settings)
    presets: dict[str, Any] = {k: v for k, v in vars(module).get("PRESETS", {}).items() if isinstance(v, settings_type)}
    defaults = {}
    if rest and not rest[0].startswith("-") and not program.has_words:
        if rest[0] not in presets:
            words = [other.removeprefix(f"{name} ") for other in PROGRAMS if other.startswith(f"{name} ")]
            raise _unknown("preset", rest[0], [*presets, *words], f"vla {name}")
        defaults = {"default": presets[rest[0]]}
        rest = rest[1:]

    import tyro

    return program, tyro.cli(
        settings_type,
        prog=f"vla {name}",
        description=program.summary + (f". Presets: {', '.join(presets)}." if presets else ""),
        args=rest,
        # Only the docstring under a field is its help: tyro would take a comment there for the next field's.
        config=(tyro.conf.HelptextFromCommentsOff,),
        **defaults,
    )


def call(program: Program, settings: Any) -> Any:
    """Run a program with what it needs."""
    run = getattr(importlib.import_module(program.module), program.run)
    return _CALLS[program.needs](run, settings)


def _hush_libraries() -> None:
    """What libraries say of one another, in every run, that no user can act on."""
    asked_by_peft = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", asked_by_peft, FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed


def _run_alone(run: Callable[..., Any], settings: Any) -> Any:
    return run(settings)


def _run_with_suite(run: Callable[..., Any], settings: Any) -> Any:
    from vla.eval.suites import get_suite

    return run(settings, get_suite(settings.suite, settings.tasks))


def _run_with_experts(run: Callable[..., Any], settings: Any) -> Any:
    from vla.eval.suites import get_suite

    return run(settings, get_suite(settings.suite, settings.tasks, expert=True))


def _run_with_eval_suite(run: Callable[..., Any], settings: Any) -> Any:
    if not settings.eval_suite:
        return run(settings)
    from vla.eval.suites import get_suite

    return run(settings, get_suite(settings.eval_suite, settings.eval_tasks))


def _run_with_policy(run: Callable[..., Any], settings: Any) -> Any:
    if not settings.policy.startswith(("http://", "https://")) or settings.dry_run:
        return run(settings)
    from vla.serve.remote_policy import RemotePolicy

    return run(settings, policy=RemotePolicy(settings.policy))


_CALLS = {
    "": _run_alone,
    "suite": _run_with_suite,
    "eval suite": _run_with_eval_suite,
    "expert": _run_with_experts,
    "policy": _run_with_policy,
}


def _split_program(argv: Sequence[str]) -> tuple[str, list[str]]:
    """`["data", "stats", "--x"]` -> `("data stats", ["--x"])`."""
    for n_words in (2, 1):
        name = " ".join(argv[:n_words])
        if name in PROGRAMS:
            return name, list(argv[n_words:])
    subprograms = [name for name in PROGRAMS if name.startswith(f"{argv[0]} ")]
    if subprograms and argv[1:2] and argv[1] in ("-h", "--help"):
        print("\n".join(f"  vla {name}  {PROGRAMS[name].summary}" for name in subprograms))
        raise SystemExit(0)
    given = " ".join(argv[:2]) if subprograms else argv[0]
    raise _unknown("program", given, subprograms or list(PROGRAMS), "vla")


def _unknown(kind: str, given: str, known: list[str], command: str) -> VlaError:
    if not known:
        return problem(f"{kind} {given!r}", f"flags only: `{command}` has no {kind}s", f"{command} --help")
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    fix = f"did you mean `{command} {near[0]}`?" if near else f"{command} --help"
    return problem(f"{kind} {given!r}", f"one of {', '.join(known)}", fix)


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


if __name__ == "__main__":
    sys.exit(main())
