"""Plots of a run's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vla.files import read_jsonl


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
