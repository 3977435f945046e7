"""The demo's report: one self-contained page about the whole road."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla.eval.html import (
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
from vla.eval.results import EvalResult, compare, read_result
from vla.files import read_jsonl, write_text

EVALUATIONS = {"after SFT": "eval-sft", "after RL": "eval-rl", "RL, quantized, over HTTP": "eval-http"}


def write_demo_report(out: Path, settings: dict[str, Any]) -> Path:
    """`out/report.html` and `out/summary.json` from what the stages left in `out`."""
    results = {label: read_result(out / folder) for label, folder in EVALUATIONS.items()}
    latency = json.loads((out / "latency.json").read_text())
    summary = summarize(results, latency, out)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    parts = [
        section("Result", _cards(summary)),
        section(
            "Success",
            _success_chart(results),
            _success_table(results),
            note="The same initial states for all three; no training stage saw them. Wilson 95 % intervals.",
        ),  # fmt: skip
        section("Quantized against full precision", _serving_table(results, latency, out)),
        section("Fine-tuning", *_sft_curves(out)),
        section("RL from sparse success", *_rl_curves(out)),
        section(
            "Roll-outs", gallery(_videos(out, results)), note="The first episode of each task, not chosen by outcome."
        ),
        section("Where the time went", _time_table(out)),
        section(
            "How this was made",
            code("vla demo --out " + str(settings["out"])),
            details("Settings", code(json.dumps(settings, indent=2, default=str))),
            details("Versions", code(json.dumps(results["after RL"].versions, indent=2))),
        ),  # fmt: skip
    ]
    tasks = ", ".join(settings["tasks"])
    write_text(
        out / "report.html", page("From demonstrations to an evaluated endpoint", f"Meta-World: {tasks}", *parts)
    )
    return out / "report.html"


def summarize(results: dict[str, EvalResult], latency: dict[str, Any], out: Path) -> dict[str, Any]:
    """The numbers of the first section, for scripts that run several seeds."""
    before, after, http = results.values()
    gain, quantized = compare(before, after), compare(after, http)
    rates = {label: r.tally().interval for label, r in results.items()}
    return {
        "success": {label: {"rate": i.estimate, "low": i.low, "high": i.high} for label, i in rates.items()},
        "episodes": before.tally().trials,
        "rl_gain": {"rate": gain.gain.estimate, "low": gain.gain.low, "high": gain.gain.high, "mcnemar_p": gain.p_value},
        "quantized_minus_full": {"rate": quantized.gain.estimate, "low": quantized.gain.low, "high": quantized.gain.high},
        "quantization": latency["quantization"], "latency": latency["quantized"],
        "minutes": sum(row["wall_s"] for row in read_jsonl(out / "stages.jsonl")) / 60,
    }  # fmt: skip


def _cards(summary: dict[str, Any]) -> Any:
    rates = list(summary["success"].values())
    gain, latency = summary["rl_gain"], summary["latency"]
    return cards([
        ("success after SFT", percent(rates[0]["rate"]), f"{percent(rates[0]['low'])} to {percent(rates[0]['high'])}"),
        ("success after RL", percent(rates[1]["rate"]), f"{percent(rates[1]['low'])} to {percent(rates[1]['high'])}"),
        ("gain of RL", f"{100 * gain['rate']:+.0f} points", f"95% {100 * gain['low']:+.0f} to {100 * gain['high']:+.0f}, paired"),
        ("quantized, over HTTP", percent(rates[2]["rate"]), f"{percent(rates[2]['low'])} to {percent(rates[2]['high'])}"),
        ("one query over HTTP", f"{latency['p50_ms']:.0f} ms", f"p99 {latency['p99_ms']:.0f} ms"),
        ("time", f"{summary['minutes']:.1f} min", "all stages"),
    ])  # fmt: skip


def _success_chart(results: dict[str, EvalResult]) -> Any:
    tasks = [task.name for task in next(iter(results.values())).tasks]
    series = {label: [r.tally(task).interval for task in (*tasks, None)] for label, r in results.items()}
    return bar_chart_svg([*tasks, "all"], series, x_label="success rate (whiskers: Wilson 95% interval)")


def _success_table(results: dict[str, EvalResult]) -> Any:
    tasks = [task.name for task in next(iter(results.values())).tasks]
    rows = [
        (name or "all", *(f"{r.tally(name).successes}/{r.tally(name).trials} · {percent_interval(r.tally(name).interval)}"
                          for r in results.values()))
        for name in (*tasks, None)
    ]  # fmt: skip
    return table(("task", *results), rows, last_is_total=True)


def _serving_table(results: dict[str, EvalResult], latency: dict[str, Any], out: Path) -> Any:
    full, quantized = results["after RL"], results["RL, quantized, over HTTP"]
    times = latency["quantized"]
    local = full.latency_ms
    return table(("", "weights", "success", "p50 ms", "p99 ms", "measured as"), [
        ("full precision, local", _megabytes(full.policy_metadata["weight_bytes"]), percent_interval(full.tally().interval),
         f"{local['p50']:.0f}", f"{local['p99']:.0f}", "batched call, simulators running beside it"),
        (f"{latency['quantization']}, HTTP", _megabytes(latency["weight_bytes"]), percent_interval(quantized.tally().interval),
         f"{times['p50_ms']:.0f}", f"{times['p99_ms']:.0f}", f"{times['n']} single queries, nothing else running"),
        ("adapter on disk", _megabytes(_folder_bytes(out / "rl" / "policy" / "adapter")), "", "", "", ""),
        ("demonstrations on disk", _megabytes(_folder_bytes(out / "demos")), "", "", "", ""),
    ])  # fmt: skip


def _curve(rows: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if row.get(y) is not None]


def _sft_curves(out: Path) -> list[Any]:
    rows = read_jsonl(out / "sft" / "metrics.jsonl")
    loss = {"training": _curve(rows, "step", "loss"), "held out": _curve(rows, "step", "holdout_loss")}
    accuracy = {
        "training": _curve(rows, "step", "action_token_accuracy"),
        "held out": _curve(rows, "step", "holdout_action_token_accuracy"),
    }
    return [
        line_chart_svg(loss, x_label="optimiser step", y_label="cross-entropy per action token", markers=False),
        line_chart_svg(
            accuracy, x_label="optimiser step", y_label="action-token accuracy", y_percent=True, markers=False
        ),
    ]


def _rl_curves(out: Path) -> list[Any]:
    rows = read_jsonl(out / "rl" / "metrics.jsonl")
    tasks = sorted({key.removeprefix("success/") for row in rows for key in row if key.startswith("success/")})
    success = {"all": _curve(rows, "iteration", "success")}
    success |= {task: _curve(rows, "iteration", f"success/{task}") for task in tasks}
    groups = {"kept": _curve(rows, "iteration", "kept"), "rejected, all equal": _curve(rows, "iteration", "all_equal")}
    return [
        line_chart_svg(
            success, x_label="iteration", y_label="success of sampled training rollouts", y_range=(0, 1), y_percent=True
        ),
        line_chart_svg(groups, x_label="iteration", y_label="groups"),
    ]


def _videos(out: Path, results: dict[str, EvalResult]) -> list[Any]:
    figures = []
    for label, result in results.items():
        folder = out / EVALUATIONS[label]
        for row in result.rows:
            if row.video is not None and row.index == 0:
                figures.append(video_tag((folder / row.video).read_bytes(), f"{row.task}, {label} ·", row.success))
    return figures


def _time_table(out: Path) -> Any:
    totals: dict[str, float] = {}
    for row in read_jsonl(out / "stages.jsonl"):
        totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["wall_s"]
    rows = [(name, f"{seconds:.0f}") for name, seconds in totals.items()]
    return table(("stage", "seconds"), [*rows, ("all", f"{sum(totals.values()):.0f}")], last_is_total=True)


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
