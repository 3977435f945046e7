"""`vla eval compare`: is b better than a? Paired: episode by episode from the same initial state.

    vla eval compare runs/eval-sft runs/eval-rl --out compare.html

Pairing by (task, seed) takes the luck of the initial states out of the difference. The interval is Agresti and Min's for
paired proportions, the p-value McNemar's exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from vla.eval.html import (
    Html,
    bar_chart_svg,
    cards,
    code,
    gallery,
    page,
    percent,
    percent_interval,
    section,
    signed_interval,
    table,
    video_tag,
)
from vla.eval.results import Comparison, EvalResult, compare, read_result
from vla.eval.statistics import wilson
from vla.eval.terminal import print_comparison
from vla.files import write_json, write_text
from vla.types import problem

SCHEMA = "vla-compare/1"
# Settings that say where and how fast an evaluation was run, not what was evaluated.
NOT_COMPARED = ("out", "dry_run", "workers", "slots", "videos_per_task", "video_every_steps", "reset_timeout_s",
                "step_timeout_s", "max_fault_fraction", "shard")  # fmt: skip
MAX_VIDEO_PAIRS = 12


@dataclass(frozen=True)
class Settings:
    """Compare two evaluations on the episodes that both have."""

    a: tyro.conf.Positional[Path]
    """Folder of the first evaluation."""
    b: tyro.conf.Positional[Path]
    """Folder of the second one: gains are b minus a."""
    out: Path | None = None
    """A page (.html) to write, with the same as JSON beside it. Default: only the table on the terminal."""


def run(settings: Settings) -> dict[str, Any]:
    """Compare, print, write; returns the JSON (docs/result-schema.md).

    Raises:
        VlaError: a folder without a finished evaluation, no episode in common, `out` that is no .html.
    """
    if settings.out is not None and settings.out.suffix != ".html":
        raise problem(f"out={settings.out}", "a name that ends in .html", "e.g. --out compare.html")
    a, b = read_result(settings.a), read_result(settings.b)
    overall = compare(a, b)
    shared = {task for task, _ in a.outcomes().keys() & b.outcomes().keys()}
    tasks = {task.name: compare(a, b, task.name) for task in a.tasks if task.name in shared}
    differences = find_differences(a, b)
    value = to_json(settings, a, b, overall, tasks, differences)
    remarks = [verdict(overall), *(f"differs: {name}: {x!r} and {y!r}" for name, x, y in differences)]
    if settings.out is not None:
        write_json(settings.out.with_suffix(".json"), value)
        write_text(settings.out, build_page(settings, a, b, overall, tasks, differences))
        remarks.append(f"page: {settings.out}")
    print_comparison(str(settings.a), str(settings.b), [*tasks.items(), ("all", overall)], remarks)
    return value


def verdict(comparison: Comparison) -> str:
    """One sentence: which is better, or that this many pairs cannot tell."""
    gain, p = signed_interval(comparison.gain), f"McNemar p = {comparison.p_value:.2g}"
    if comparison.p_value >= 0.05:
        return f"no difference shown by {comparison.pairs} pairs: {gain} points, {p}"
    return f"{'b' if comparison.gain.estimate > 0 else 'a'} is better: b - a is {gain} points, {p}"


def find_differences(a: EvalResult, b: EvalResult) -> list[tuple[str, Any, Any]]:
    """(name, in a, in b) of settings and versions: what else than the policy may explain a difference."""
    found = []
    for x, y in ((a.settings, b.settings), (a.versions, b.versions)):
        names = sorted(name for name in x.keys() | y.keys() if name not in NOT_COMPARED)
        found += [(name, x.get(name), y.get(name)) for name in names if x.get(name) != y.get(name)]
    return found


def to_json(
    settings: Settings,
    a: EvalResult,
    b: EvalResult,
    overall: Comparison,
    tasks: dict[str, Comparison],
    differences: Sequence[tuple[str, Any, Any]],
) -> dict[str, Any]:
    """See docs/result-schema.md; rates are in [0, 1]."""
    n_common = overall.pairs
    return {
        "schema": SCHEMA,
        "a": {
            "folder": str(settings.a),
            "policy": a.policy,
            "suite": a.suite,
            "unpaired": len(a.outcomes()) - n_common,
        },
        "b": {
            "folder": str(settings.b),
            "policy": b.policy,
            "suite": b.suite,
            "unpaired": len(b.outcomes()) - n_common,
        },
        "overall": _comparison_json(overall),
        "tasks": {name: _comparison_json(comparison) for name, comparison in tasks.items()},
        "differences": [{"name": name, "a": x, "b": y} for name, x, y in differences],
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(comparison).items() if name != "gain"}
    return {"gain": comparison.gain.estimate, "low": comparison.gain.low, "high": comparison.gain.high} | fields


def build_page(
    settings: Settings,
    a: EvalResult,
    b: EvalResult,
    overall: Comparison,
    tasks: dict[str, Comparison],
    differences: Sequence[tuple[str, Any, Any]],
) -> str:
    return page(
        f"{b.policy} against {a.policy}",
        f"{overall.pairs} pairs of episodes on {a.suite}, each pair from one initial state; b minus a",
        _summary(overall),
        _tasks_section(tasks, overall),
        _pairs_section(a, b),
        _differences_section(differences),
        section("How this was made", code(f"vla eval compare {settings.a} {settings.b} --out {settings.out}")),
    )


def _summary(overall: Comparison) -> Html:
    rates = [percent(n / overall.pairs) for n in (overall.successes_a, overall.successes_b)]
    low_high = f"95% interval {100 * overall.gain.low:+.0f} to {100 * overall.gain.high:+.0f}"
    items = [
        ("success of a", rates[0], f"{overall.successes_a} / {overall.pairs}"),
        ("success of b", rates[1], f"{overall.successes_b} / {overall.pairs}"),
        ("gain", f"{100 * overall.gain.estimate:+.0f} points", low_high),
        ("McNemar's p", f"{overall.p_value:.2g}", f"{overall.only_b} gained, {overall.only_a} lost"),
    ]
    return section("Result", cards(items), note=verdict(overall))


def _tasks_section(tasks: dict[str, Comparison], overall: Comparison) -> Html:
    every = [*tasks.items(), ("all", overall)]
    series = {
        "a": [wilson(c.successes_a, c.pairs) for _, c in every],
        "b": [wilson(c.successes_b, c.pairs) for _, c in every],
    }
    chart = bar_chart_svg([name for name, _ in every], series, x_label="success rate (whiskers: Wilson 95% interval)")
    headers = ("task", "pairs", "a", "b", "b - a, points [95%]", "only a", "only b", "McNemar's p")
    rows = [
        (name, c.pairs, percent_interval(x), percent_interval(y), signed_interval(c.gain), c.only_a, c.only_b, f"{c.p_value:.2g}")
        for (name, c), x, y in zip(every, series["a"], series["b"], strict=True)
    ]  # fmt: skip
    note = f"The tasks' p-values are not corrected for their number ({len(tasks)}). Differences are judged by the paired interval, not by whether the whiskers overlap."
    return section("By task", chart, table(headers, rows, last_is_total=True), note=note)


def _pairs_section(a: EvalResult, b: EvalResult) -> Html:
    """Films of the pairs that differ, a beside b."""
    rows_a, rows_b = ({(row.task, row.seed): row for row in result.rows} for result in (a, b))
    figures = []
    for key in sorted(a.outcomes().keys() & b.outcomes().keys()):
        x, y = rows_a[key], rows_b[key]
        if x.success == y.success or x.video is None or y.video is None or len(figures) >= 2 * MAX_VIDEO_PAIRS:
            continue
        if (a.out / x.video).exists() and (b.out / y.video).exists():
            films = (("a", a.out / x.video, x.success), ("b", b.out / y.video, y.success))
            figures += [
                video_tag(path.read_bytes(), f"{key[0]} · seed {key[1]} · {which}", ok) for which, path, ok in films
            ]
    if not figures:
        return Html("")
    return section("Where they differ", gallery(figures), note="Filmed episodes of which only one succeeded.")


def _differences_section(differences: Sequence[tuple[str, Any, Any]]) -> Html:
    if not differences:
        return Html("")
    return section("Settings and versions that differ", table(("", "a", "b"), differences))
