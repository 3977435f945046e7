"""Plots of a run's metrics, as a picture and as a page."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vla.files import read_jsonl, write_text

_WIDTH, _HEIGHT, _LEFT = 420, 180, 60
_COLOURS = ("#2a6fc9", "#d9622b", "#16936a", "#8a5fd0", "#b8860b", "#c2447c", "#5f5e5a")
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 24px auto; max-width: 1000px; padding: 0 16px; color-scheme: light dark; }
main { display: flex; flex-wrap: wrap; gap: 24px; } figure { margin: 0; width: 460px; max-width: 100%; } svg { width: 100%; }
svg text { font-size: 11px; fill: currentColor; } path { fill: none; stroke-width: 1.5; } circle { opacity: 0; }
circle:hover { opacity: 1; } .frame { stroke: #8886; } figcaption span { margin-right: 14px; white-space: nowrap; }"""


def plot_curves(metrics: Path, out: Path, panels: Sequence[Sequence[str]], x: str = "step") -> None:
    """PNG with one panel per group of metric names, read from a JSONL file; rows without a metric are skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_jsonl(metrics)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, names in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(row[x], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def curves_page(metrics: Path, out: Path, title: str, x: str = "step") -> None:
    """One self-contained HTML page with a panel per group of metrics; a point shows its values under the pointer.

    `loss` and `holdout_loss` share a panel, and so do `l1_physical/dx` and `l1_physical/dy`. Nothing is loaded from elsewhere.
    """
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in read_jsonl(metrics):
        for name, value in row.items():
            if name != x and isinstance(value, int | float):
                series[name].append((row[x], value))
    panels: dict[str, list[str]] = defaultdict(list)
    for name in series:
        group = name.partition("/")[0] if "/" in name else name.removeprefix("holdout_").removeprefix("free_running_")
        panels[group].append(name)
    figures = "\n".join(_panel(names, series) for names in panels.values())
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    write_text(
        out,
        f"{head}<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><main>{figures}</main></body></html>\n",
    )


def _panel(names: Sequence[str], series: dict[str, list[tuple[float, float]]]) -> str:
    points = [point for name in names for point in series[name]]
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)

    def place(at: float, value: float) -> tuple[float, float]:
        across = (at - min(xs)) / ((max(xs) - min(xs)) or 1.0)
        return _LEFT + across * _WIDTH, 10 + (1.0 - (value - low) / ((high - low) or 1.0)) * _HEIGHT

    lines, legend = [], []
    for i, name in enumerate(names):
        colour, label = _COLOURS[i % len(_COLOURS)], html.escape(name)
        at = [place(*point) for point in series[name]]
        lines.append(f'<path stroke="{colour}" d="M{" L".join(f"{a:.1f},{b:.1f}" for a, b in at)}"/>')
        for (a, b), (step, value) in zip(at, series[name], strict=True):
            lines.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"><title>{label}, {step:g}: {value:.4g}</title></circle>'
            )
        legend.append(f'<span style="color:{colour}">{label} {series[name][-1][1]:.4g}</span>')
    bottom = 10 + _HEIGHT
    axes = (
        f'<rect class="frame" fill="none" x="{_LEFT}" y="10" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{bottom + 16}">{min(xs):g}</text>'
        f'<text x="{_LEFT + _WIDTH}" y="{bottom + 16}" text-anchor="end">{max(xs):g}</text>'
    )
    picture = f'<svg viewBox="0 0 {_LEFT + _WIDTH + 6} {bottom + 22}">{axes}{"".join(lines)}</svg>'
    return f"<figure>{picture}<figcaption>{''.join(legend)}</figcaption></figure>"
