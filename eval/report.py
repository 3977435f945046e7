"""One self-contained HTML file about one evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from vla.eval.html import (
    Html,
    bar_chart_svg,
    cards,
    code,
    details,
    gallery,
    line_chart_svg,
    page,
    percent,
    percent_interval,
    section,
    table,
    video_tag,
)
from vla.eval.results import EvalResult, steps_curve
from vla.files import write_text

REPORT_FILE = "report.html"
MAX_TASK_CURVES = 6


def write_report(result: EvalResult) -> Path:
    """Write `report.html` into the evaluation's folder."""
    path = result.out / REPORT_FILE
    write_text(path, build_report(result))
    return path


def build_report(result: EvalResult) -> str:
    overall = result.tally()
    subtitle = f"{result.policy} · {overall.trials} episodes on {len(result.tasks)} tasks"
    return page(
        f"Evaluation on {result.suite}",
        subtitle,
        _summary(result),
        tasks_section(result),
        curves_section(result),
        videos_section(result),
        _latency(result),
        provenance_section(result),
    )


def _summary(result: EvalResult) -> Html:
    overall, latency = result.tally(), result.latency_ms
    low_high = f"95% interval {percent(overall.interval.low)} to {percent(overall.interval.high)}"
    items = [
        ("success, all episodes", percent(overall.interval.estimate), low_high),
        ("episodes", f"{overall.successes} / {overall.trials}", "successes / trials"),
        ("mean of the tasks", percent(result.macro), "each task weighs the same"),
        ("policy call, median", f"{latency['p50']:.0f} ms", f"p99 {latency['p99']:.0f} ms"),
        ("simulator faults", str(overall.faults), "neither success nor failure"),
    ]
    return section("Result", cards(items))


def tasks_section(result: EvalResult) -> Html:
    """Bars and a table, one row per task."""
    names = [task.name for task in result.tasks]
    chart = bar_chart_svg(
        names,
        {"success": [result.tally(name).interval for name in names]},
        x_label="success rate (whiskers: Wilson 95% interval)",
    )
    headers = ("task", "success", "rate [95%]", "time-outs", "undecodable", "faults", "steps to success")
    rows = []
    for name in [*names, None]:
        tally = result.tally(name)
        cells = (name or "all", f"{tally.successes} / {tally.trials}", percent_interval(tally.interval))
        steps = f"{tally.mean_steps_to_success:.0f}" if tally.successes else "–"
        rows.append((*cells, tally.timeouts, tally.undecodable, tally.faults, steps))
    return section("Success by task", chart, table(headers, rows, last_is_total=True))


def curves_section(result: EvalResult) -> Html:
    """Cumulative success over control steps."""
    curves = {"all tasks": steps_curve(result.rows)}
    if 1 < len(result.tasks) < MAX_TASK_CURVES:
        curves |= {
            task.name: steps_curve([row for row in result.rows if row.task == task.name]) for task in result.tasks
        }
    chart = line_chart_svg(
        curves, x_label="control steps", y_label="episodes that have succeeded", y_range=(0.0, 1.0), y_percent=True,
        markers=False,
    )  # fmt: skip
    return section("How fast", chart)


def videos_section(result: EvalResult) -> Html:
    """The filmed episodes, embedded."""
    figures = [
        video_tag(
            (result.out / row.video).read_bytes(), f"{row.task} · seed {row.seed} · {row.n_steps} steps ·", row.success
        )
        for row in result.rows
        if row.video is not None and (result.out / row.video).exists()
    ]
    if not figures:
        return Html("")
    return section("Roll-outs", gallery(figures), note="The first episodes of each task, not chosen by their outcome.")


def _latency(result: EvalResult) -> Html:
    latency = result.latency_ms
    row = [f"{latency[name]:.1f}" for name in ("p50", "p90", "p99")]
    note = (
        "Each query counts with the duration of the batched call that answered it; simulators ran on the same machine."
    )
    return section(
        "Policy calls", table(("queries", "p50 ms", "p90 ms", "p99 ms"), [(latency["queries"], *row)]), note=note
    )


def provenance_section(result: EvalResult) -> Html:
    """Command, versions, settings."""
    versions = table(("library", "version"), sorted(result.versions.items()))
    settings = code(json.dumps(result.settings, indent=2, default=str))
    metadata = code(json.dumps(result.policy_metadata, indent=2, default=str))
    folded = (
        details("Versions", versions),
        details("Settings", settings),
        details("What the policy says of itself", metadata),
    )
    return section("How this was made", code(result.command), *folded)
