"""A training run's folder: whose it is, and metrics that fit its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.files import read_jsonl, write_json, write_text
from vla.types import problem


def open_run(out: Path, settings: Any, data: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Claim a run folder: a new one, or the same run again with `resume`. Writes settings.json and data.json.

    Args:
        data: dataset -> {"hash": its `data_hash`, "revision": its commit on the Hub}. A run that goes on must find the data
            it began with.

    Raises:
        VlaError: the folder holds a run and neither `resume` nor `overwrite` was given, or it is another run.
    """
    path = out / "settings.json"
    volatile = ("resume", "overwrite", "dry_run")
    mine = {
        k: v for k, v in json.loads(json.dumps(dataclasses.asdict(settings), default=str)).items() if k not in volatile
    }
    if settings.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    if path.exists():
        if not settings.resume:
            raise problem(f"a run in {out}", "an empty folder", "pass --resume to continue it, or --overwrite")
        defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING}
        theirs = json.loads(json.dumps(defaults, default=str))  # the run may be older than a setting
        theirs |= json.loads(path.read_text())
        changed = [name for name in mine if mine[name] != theirs.get(name)]
        if changed:
            shown = ", ".join(f"{n} {theirs.get(n)!r} -> {mine[n]!r}" for n in changed)
            raise problem(f"other settings than {path}: {shown}", "the same run", "use its settings, or another --out")
    _check_data(out / "data.json", data)
    write_json(path, mine)
    if data is not None:
        write_json(out / "data.json", {name: dict(row) for name, row in data.items()})


def data_revisions(out: Path) -> dict[str, str]:
    """Dataset -> its commit on the Hub when the run in this folder began."""
    path = out / "data.json"
    return {name: row["revision"] for name, row in json.loads(path.read_text()).items()} if path.exists() else {}


def _check_data(path: Path, data: Mapping[str, Mapping[str, str]] | None) -> None:
    if data is None or not path.exists():
        return
    theirs = json.loads(path.read_text())
    changed = [name for name in {**theirs, **data} if theirs.get(name) != data.get(name)]
    if changed:
        raise problem(f"{', '.join(changed)} with other episodes, numbers or names than {path} says", "the same data",
                      "restore it, or begin a new run in another --out")  # fmt: skip


def cut_metrics(metrics: Path, step: int, counter: str = "step") -> None:
    """Drop rows newer than the checkpoint that is resumed, so that nothing is logged twice."""
    if metrics.exists():
        rows = [row for row in read_jsonl(metrics) if row[counter] <= step]
        write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows))
