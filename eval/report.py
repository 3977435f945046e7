"""One self-contained HTML file about one evaluation."""

from __future__ import annotations

import json
from collections import Counter
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
    picture_tag,
    section,
    table,
    video_tag,
)
from vla.eval.results import EpisodeRow, EvalResult, steps_curve
from vla.files import write_text

REPORT_FILE = "report.html"
MAX_TASK_CURVES = 6
MAX_PICTURES = 40
MAX_VIDEOS = 60


COUNTS_NOTE = (
    "Success, failure (the simulator ended the episode), time-out (the step limit did) and undecodable (the model's output "
    "was no action) add up to the trials. A fault is the simulator's, twice in a row, and counts as neither."
)


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
        failures_section(result),
        successes_section(result),
        faults_section(result),
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
    headers = ("task", "success", "rate [95%]", "failures", "time-outs", "undecodable", "faults", "steps to success")
    rows = []
    for name in [*names, None]:
        tally = result.tally(name)
        cells = (name or "all", f"{tally.successes} / {tally.trials}", percent_interval(tally.interval))
        steps = f"{tally.mean_steps_to_success:.0f}" if tally.successes else "–"
        rows.append((*cells, tally.failures, tally.timeouts, tally.undecodable, tally.faults, steps))
    return section("Success by task", chart, table(headers, rows, last_is_total=True), note=COUNTS_NOTE)


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


def failures_section(result: EvalResult) -> Html:
    """What went wrong, to be looked at: films first, then the last frames of the failures that were not filmed."""
    failed = [row for row in result.rows if row.fault is None and not row.success]
    figures = [_video(result, row) for row in failed if _has(result, row.video)][:MAX_VIDEOS]
    pictured = [row for row in failed if _has(result, row.last_frame)]
    figures += [_picture(result, row) for row in _task_by_task(pictured)[:MAX_PICTURES]]
    if not figures:
        return Html("")
    note = f"{len(figures)} of {len(failed)}; a still is the last frame that the policy saw."
    return section("Failures", gallery(figures), note=note)


def successes_section(result: EvalResult) -> Html:
    """The filmed successes."""
    filmed = [row for row in result.rows if row.fault is None and row.success and _has(result, row.video)]
    if not filmed:
        return Html("")
    figures = [_video(result, row) for row in _task_by_task(filmed)[:MAX_VIDEOS]]
    return section(
        "Successes", gallery(figures), note="Filmed are the first episodes of each task, whatever their outcome."
    )


def faults_section(result: EvalResult) -> Html:
    """Which episodes the simulator spoiled, and how."""
    rows = [(row.task, row.seed, row.fault) for row in result.rows if row.fault is not None]
    return section("Simulator faults", table(("task", "seed", "what happened"), rows)) if rows else Html("")


def _has(result: EvalResult, name: str | None) -> bool:
    return name is not None and (result.out / name).exists()


def _video(result: EvalResult, row: EpisodeRow) -> Html:
    return video_tag((result.out / str(row.video)).read_bytes(), _caption(row), result.outcome(row))


def _picture(result: EvalResult, row: EpisodeRow) -> Html:
    return picture_tag((result.out / str(row.last_frame)).read_bytes(), _caption(row), result.outcome(row))


def _caption(row: EpisodeRow) -> str:
    return f"{row.task} · seed {row.seed} · {row.n_steps} steps ·"


def _task_by_task(rows: list[EpisodeRow]) -> list[EpisodeRow]:
    """One of each task, then the second of each, ...: a limit cuts no task off."""
    n_before: Counter[str] = Counter()
    numbered = []
    for row in rows:
        numbered.append((n_before[row.task], row))
        n_before[row.task] += 1
    return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]


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
