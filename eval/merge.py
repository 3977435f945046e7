"""`vla eval merge`: one evaluation that several machines ran in parts, put together.

    vla eval --policy runs/sft/policy --shard 1/2 --out runs/part1        # on one machine
    vla eval --policy runs/sft/policy --shard 2/2 --out runs/part2        # on another
    vla eval merge runs/part1 runs/part2 --out runs/eval

The merged folder is what one machine would have written, and an ordinary evaluation's: the same `vla eval` without
`--shard` runs there what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from vla.eval.report import write_report
from vla.eval.results import EPISODES_FILE, RESULT_FILE, EpisodeRow, EvalResult, read_result, read_rows, to_json
from vla.eval.run_folder import DISK_ERRORS, SETTINGS_FILE, read_identity
from vla.eval.shards import deal
from vla.eval.terminal import print_table
from vla.files import write_bytes, write_json, write_text
from vla.types import problem

# May differ: `shard` must, and each machine may keep its copy of the policy elsewhere (its content is compared).
MAY_DIFFER = ("shard", "policy")
MAX_NAMED = 5


@dataclass(frozen=True)
class Settings:
    """Put the shards of one evaluation together."""

    shards: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `vla eval --shard i/n` wrote, in any order."""
    out: Path
    """Folder of the whole evaluation."""
    allow_missing: bool = False
    """Merge although episodes are missing: those of a shard that is not there or not finished."""


def run(settings: Settings) -> EvalResult:
    """Merge; returns what `result.json` and the report in `out` say. The shards are left as they are.

    Raises:
        VlaError: a folder that is no evaluation, different evaluations, an episode that two shards have, missing
            episodes, a folder with other episodes, a full disk. Unless the disk is full, nothing is written then.
    """
    if not settings.shards:
        raise problem("no shard", "at least one folder", "vla eval merge SHARD... --out OUT")
    identity = _common_identity(settings.shards)
    rows = _disjoint_rows(settings.shards)
    result = _merged(settings, rows)
    _check_missing(settings, result)
    text = "".join(json.dumps(asdict(row)) + "\n" for row in result.rows)
    episodes = settings.out / EPISODES_FILE
    if episodes.exists() and episodes.read_text(encoding="utf-8") != text:
        raise problem(f"{settings.out} with other episodes", "a new folder", "choose another --out, or delete it")
    try:
        _write(settings.out, identity, result, rows, text)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        got = f"{error.strerror} while writing {error.filename or settings.out}"
        raise problem(got, "a disk that takes more", "free some space and run the same command again") from error
    print_table(result)
    return result


def _common_identity(shards: Sequence[Path]) -> dict[str, Any]:
    """What all shards agree on, as the settings of the whole."""
    first = read_identity(shards[0])
    for folder in shards[1:]:
        other = read_identity(folder)
        for name in sorted(first.keys() | other.keys()):
            if name not in MAY_DIFFER and first.get(name) != other.get(name):
                raise problem(
                    f"{name}={other.get(name)!r} in {folder}, but {first.get(name)!r} in {shards[0]}",
                    "shards of one evaluation", "leave the other out; `vla eval compare` compares two evaluations",
                )  # fmt: skip
    return {**first, "shard": None}


def _disjoint_rows(shards: Sequence[Path]) -> dict[tuple[str, int], tuple[Path, EpisodeRow]]:
    """(task, index) -> the shard that has it, and its row."""
    found: dict[tuple[str, int], tuple[Path, EpisodeRow]] = {}
    for folder in shards:
        for key, row in read_rows(folder).items():
            if key in found:
                got = f"episode {row.index} of {row.task} in both {found[key][0]} and {folder}"
                raise problem(got, "every episode in one shard", "give each machine a --shard of its own")
            found[key] = (folder, row)
    return found


def _merged(settings: Settings, rows: dict[tuple[str, int], tuple[Path, EpisodeRow]]) -> EvalResult:
    """From the results of the finished shards and the rows of all."""
    finished = [read_result(folder) for folder in settings.shards if (folder / RESULT_FILE).exists()]
    if not finished:
        raise problem(f"no {RESULT_FILE} in any shard", "a finished one", "run at least one shard to its end")
    first = finished[0]
    # An unfinished shard may be that of a longer evaluation.
    n = max([result.settings["episodes_per_task"] for result in finished] + [index + 1 for _, index in rows])
    whole = {**first.settings, "shard": None, "out": str(settings.out), "episodes_per_task": n}
    names = sorted({name for result in finished for name in result.versions})
    versions = {name: " | ".join(sorted({result.versions.get(name, "none") for result in finished})) for name in names}
    chosen = [rows[task.name, i][1] for task in first.tasks for i in range(n) if (task.name, i) in rows]
    return replace(
        first, rows=tuple(chosen), settings=whole, versions=versions, out=settings.out,
        command="\n".join(result.command for result in finished), wall_s=max(result.wall_s for result in finished),
    )  # fmt: skip


def _check_missing(settings: Settings, result: EvalResult) -> None:
    have = {(row.task, row.index) for row in result.rows}
    wanted = deal([task.name for task in result.tasks], result.settings["episodes_per_task"])
    missing = [f"{task} {index}" for task, index in wanted if (task, index) not in have]
    if missing and not settings.allow_missing:
        named = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
        raise problem(
            f"{len(wanted) - len(missing)} episodes, without {len(missing)} ({named})", f"all {len(wanted)}",
            "name every shard, finish those that stopped, or pass --allow-missing",
        )  # fmt: skip


def _write(
    out: Path,
    identity: dict[str, Any],
    result: EvalResult,
    rows: dict[tuple[str, int], tuple[Path, EpisodeRow]],
    text: str,
) -> None:
    for row in result.rows:
        folder = rows[row.task, row.index][0]
        for name in (row.video, row.last_frame):
            if name is not None and (folder / name).exists() and folder.resolve() != out.resolve():
                write_bytes(out / name, (folder / name).read_bytes())
    write_json(out / SETTINGS_FILE, identity)
    write_text(out / EPISODES_FILE, text)
    write_json(out / RESULT_FILE, to_json(result))
    write_report(result)
