"""`vla data list`: the datasets of Open X-Embodiment that have a name here, and the mixtures of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vla.finetune.oxe.configs import DATASETS
from vla.finetune.oxe.mixtures import MIXTURES
from vla.finetune.oxe.registry import mixture, oxe_standardizer, usable

_WIDE = 200
"""Characters beside which the longest rows fit whole."""


@dataclass(frozen=True)
class Settings:
    """List the datasets of Open X-Embodiment: cameras, what state and action mean, and the mixtures each is in."""

    mixture: str | None = None
    """List one mixture's datasets with their weights."""
    json: bool = False
    """Print JSON and no table."""


def run(settings: Settings) -> list[dict[str, Any]]:
    """Print the datasets, or those of one mixture; returns what `--json` prints.

    Raises:
        VlaError: no mixture of that name.
    """
    if settings.mixture is None:
        rows = [describe(name) for name in DATASETS]
    else:
        rows = [{"weight": weight, **describe(name)} for name, weight in mixture(settings.mixture)]
    if settings.json:
        print(json.dumps(rows, indent=1))
        return rows
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)  # a pipe has no width: do not squeeze the names
    console.print(_table(rows, whole_names=console.width >= _WIDE))
    for line in _below(settings.mixture, rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return rows


def describe(name: str) -> dict[str, Any]:
    """One dataset's row as JSON types; `mixtures` are those it is trained on in, with its weight."""
    row, reader = DATASETS[name], oxe_standardizer(name, cameras=())
    return {
        "name": name,
        "cameras": row.cameras,
        "state_encoding": row.state_encoding,
        "state": list(reader.state_names),
        "action_encoding": row.action_encoding,
        "action": list(reader.action_names),
        "gripper": reader.gripper,
        "mixtures": {other: dict(mixture(other))[name] for other in MIXTURES if name in dict(mixture(other))},
        "note": row.note,
    }


def _table(rows: list[dict[str, Any]], whole_names: bool) -> Table:
    """A column for each mixture that is more than a dataset's own name, or only `weight` if the rows have one."""
    weighed = bool(rows) and "weight" in rows[0]
    mixtures = [] if weighed else [name for name in MIXTURES if name not in DATASETS]
    table = Table()
    table.add_column("name", overflow="fold", no_wrap=whole_names)
    for header in ["weight"] if weighed else [name.replace("_", "_\n") for name in mixtures]:
        table.add_column(header, justify="right")
    for header in ("cameras", "state", "action", "gripper"):
        table.add_column(header, overflow="fold")
    for row in rows:
        weights = [row["weight"]] if weighed else [row["mixtures"].get(name) for name in mixtures]
        cameras = "\n".join(f"{camera} {key.removeprefix('observation/')}" for camera, key in row["cameras"].items())
        table.add_row(row["name"], *("" if weight is None else f"{weight:.3g}" for weight in weights), cameras,
                      row["state_encoding"], row["action_encoding"], row["gripper"])  # fmt: skip
    return table


def _below(name: str | None, rows: list[dict[str, Any]]) -> list[str]:
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    if name is not None:
        out = [f"left out: {other} {weight:g}, {reason}" for other, weight, reason in usable(MIXTURES[name])[1]]
        return [*notes, *out]
    own = ", ".join(other for other in MIXTURES if other in DATASETS)
    return [*notes, f"{len(rows)} datasets. These are also mixtures of themselves alone: {own}"]
