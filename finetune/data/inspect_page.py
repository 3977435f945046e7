"""One self-contained HTML page about a dataset: table of episodes, sample frames, histograms of actions."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from vla.finetune.formats.lerobot_format import encode_png
from vla.finetune.formats.source import FrameSource

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; }
td { text-align: right; font-variant-numeric: tabular-nums; } td.text, th { text-align: left; }
figure { display: inline-block; margin: 0 .75rem .75rem 0; } figcaption { font-size: 13px; color: #555; }
img { max-width: 100%; } figure img { width: 160px; image-rendering: auto; } .wide { width: 100%; }
"""


def inspect_page(source: FrameSource, n_samples: int, rotation_deg: int = 0) -> str:
    """The page. `n_samples` episodes, evenly spaced, are shown with their first, middle and last frame, turned
    counter-clockwise by a multiple of 90 degrees."""
    title = html.escape(source.name)
    facts = (
        f"{source.n_episodes} episodes, {len(source)} frames, {source.fps:g} fps, cameras {', '.join(source.cameras)}"
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1><p>{html.escape(facts)}</p>",
        "<h2>Instructions</h2>", _instructions(source),
        "<h2>Actions</h2>", _ranges(source), f"<img class=wide alt='histogram of each action dimension' src='{_histograms(source)}'>",
        "<h2>Lengths</h2>", f"<img class=wide alt='histogram of episode lengths' src='{_lengths(source)}'>",
        "<h2>Sample frames</h2>", _samples(source, n_samples, rotation_deg),
        "<h2>Episodes</h2>", _episodes(source),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def by_instruction(source: FrameSource) -> dict[str, list[int]]:
    """Instruction -> its episodes."""
    found: dict[str, list[int]] = {}
    for row in source.episodes:
        found.setdefault(source.instruction_of(row.start), []).append(row.index)
    return found


def _instructions(source: FrameSource) -> str:
    rows = []
    for instruction, episodes in by_instruction(source).items():
        lengths = [source.episodes[i].stop - source.episodes[i].start for i in episodes]
        known = [s for s in (source.success_of(i) for i in episodes) if s is not None]
        success = f"{sum(known)} of {len(known)}" if known else "not recorded"
        rows.append((instruction, len(episodes), f"{min(lengths)}–{max(lengths)}", f"{np.mean(lengths):.1f}", success))
    return _table(("instruction", "episodes", "length", "mean length", "success"), rows)


def _ranges(source: FrameSource) -> str:
    actions = source.actions().astype(np.float64)
    q01, q99 = np.quantile(actions, [0.01, 0.99], axis=0)
    columns = (actions.min(0), q01, actions.mean(0), q99, actions.max(0), actions.std(0))
    rows = [(name, *(f"{c[d]:.4f}" for c in columns)) for d, name in enumerate(source.action_names)]
    return _table(("dimension", "min", "q01", "mean", "q99", "max", "std"), rows)


def _episodes(source: FrameSource) -> str:
    rows = []
    for row in source.episodes:
        success, seed = source.success_of(row.index), source.seed_of(row.index)
        shown = ("–" if success is None else "yes" if success else "no", "–" if seed is None else seed)
        rows.append((source.instruction_of(row.start), row.index, row.stop - row.start, *shown))
    return _table(("instruction", "episode", "length", "success", "seed"), rows)


def _samples(source: FrameSource, n_samples: int, rotation_deg: int) -> str:
    figures = []
    for e in sorted({int(i) for i in np.linspace(0, source.n_episodes - 1, min(n_samples, source.n_episodes))}):
        row = source.episodes[e]
        figures.append(f"<h3>Episode {e}: {html.escape(source.instruction_of(row.start))}</h3>")
        for i in sorted({row.start, (row.start + row.stop - 1) // 2, row.stop - 1}):
            for camera, image in source.images(i).items():
                caption = html.escape(f"{camera}, frame {i - row.start}")
                url = _data_url(encode_png(np.ascontiguousarray(np.rot90(image, rotation_deg // 90))))
                figures.append(f"<figure><img alt='{caption}' src='{url}'><figcaption>{caption}</figcaption></figure>")
    return "\n".join(figures)


def _histograms(source: FrameSource) -> str:
    return _panels(dict(zip(source.action_names, source.actions().T, strict=True)))


def _lengths(source: FrameSource) -> str:
    lengths = np.array([span.stop - span.start for span in source.episodes])
    return _panels({"frames per episode": lengths})


def _panels(columns: dict[str, np.ndarray]) -> str:
    """PNG as a data URL: one histogram of 50 bins per column, four in a row."""
    from matplotlib.figure import Figure

    n_rows, n_columns = -(-len(columns) // 4), min(len(columns), 4)
    figure = Figure(figsize=(11, 2.2 * n_rows), layout="constrained")
    for d, (name, values) in enumerate(columns.items()):
        axes = figure.add_subplot(n_rows, n_columns, d + 1)
        axes.hist(values[np.isfinite(values)], bins=50, color="#3b6ea5")
        axes.set_title(name.replace("$", r"\$"), fontsize=10)
        axes.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return _data_url(buffer.getvalue())


def _table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in rest)
        body.append(f"<tr><td class=text>{html.escape(str(first))}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
