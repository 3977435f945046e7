"""Building blocks of self-contained HTML reports: no scripts, no external files, readable on a phone, light and dark.

Every function returns `Html`; any other text that is put into a page is escaped.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence

from vla.eval.statistics import Interval

N_COLOURS = 6

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1a1a19; --soft: #5f5e5a; --line: #dededa;
  --c0: #2a6fc9; --c1: #d9622b; --c2: #16936a; --c3: #8a5fd0; --c4: #b8860b; --c5: #c2447c; --good: #16804f; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201f; --ink: #ecebe7; --soft: #a5a49e;
  --line: #3a3a37; --c0: #5b9bea; --c1: #f08a55; --c2: #3fbf92; --c3: #b193ee; --c4: #d9a93a; --c5: #e678a8;
  --good: #4cc38a; --bad: #f0736a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 0 0 12px; }
p { margin: 0 0 12px; max-width: 70ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px; margin: 18px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px; }
.cards b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 650; }
.cards span { display: block; color: var(--soft); font-size: .85rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
figure { margin: 0; }
video, img { width: 100%; border-radius: 6px; display: block; background: #000; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { display: block; width: 100%; max-width: 640px; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg text.ink { fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); } svg .whisker { stroke: var(--ink); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 8px; font-size: .88rem; color: var(--soft); }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px; overflow-x: auto; font-size: .82rem; }
summary { cursor: pointer; color: var(--soft); }
"""


class Html(str):
    """Text that is HTML already."""


def escaped(value: object) -> Html:
    """`value` as HTML: unchanged if it is Html, escaped otherwise; floats get three significant digits."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(f"{value:.3g}" if isinstance(value, float) else str(value)))


def page(title: str, subtitle: str, *sections: Html) -> str:
    """The whole document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escaped(title)}</title>'
    top = f'<h1>{escaped(title)}</h1><p class="soft">{escaped(subtitle)}</p>'
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>{top}\n{body}\n</main></body></html>\n'


def section(title: str, *parts: object, note: str = "") -> Html:
    """A titled block; `note` explains in small print what is shown."""
    small = f'<p class="soft">{escaped(note)}</p>' if note else ""
    return Html(f"<section><h2>{escaped(title)}</h2>{small}{''.join(escaped(part) for part in parts)}</section>")


def paragraph(text: object) -> Html:
    return Html(f"<p>{escaped(text)}</p>")


def table(headers: Sequence[object], rows: Sequence[Sequence[object]], *, last_is_total: bool = False) -> Html:
    """First column left, numbers right; wide tables scroll inside their block."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in headers)
    lines = []
    for i, row in enumerate(rows):
        total = ' class="total"' if last_is_total and i == len(rows) - 1 else ""
        lines.append(f"<tr{total}>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>")
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def cards(items: Sequence[tuple[object, object, object]]) -> Html:
    """Big numbers: (label, value, remark)."""
    cells = [f"<div><span>{escaped(a)}</span><b>{escaped(b)}</b><span>{escaped(c)}</span></div>" for a, b, c in items]
    return Html(f'<div class="cards">{"".join(cells)}</div>')


def code(text: str) -> Html:
    return Html(f"<pre>{escaped(text)}</pre>")


def details(summary: str, *parts: object) -> Html:
    """Folded away until clicked."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{''.join(escaped(part) for part in parts)}</details>")


def video_tag(mp4: bytes, caption: object, outcome: bool | str | None = None) -> Html:
    """An embedded video; `outcome` (True, False, or a word other than "success" for what went wrong) in its colour."""
    source = "data:video/mp4;base64," + base64.b64encode(mp4).decode()
    if isinstance(outcome, bool):
        outcome = "success" if outcome else "failure"
    colour = "good" if outcome == "success" else "bad"
    word = "" if outcome is None else f' <span class="{colour}">{escaped(outcome)}</span>'
    player = f'<video src="{source}" controls muted loop playsinline preload="metadata"></video>'
    return Html(f"<figure>{player}<figcaption>{escaped(caption)}{word}</figcaption></figure>")


def picture_tag(jpeg: bytes, caption: object, outcome: str) -> Html:
    """An embedded picture of an episode that did not succeed."""
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    word = f'<span class="bad">{escaped(outcome)}</span>'
    image = f'<img src="{source}" alt="last frame of {escaped(caption)}">'
    return Html(f"<figure>{image}<figcaption>{escaped(caption)} {word}</figcaption></figure>")


def gallery(figures: Sequence[Html]) -> Html:
    return Html(f'<div class="gallery">{"".join(figures)}</div>')


def percent(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}%"


def percent_interval(interval: Interval) -> str:
    """`70% [48, 85]`."""
    return f"{percent(interval.estimate)} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def signed_interval(interval: Interval) -> str:
    """`+12 [-3, +27]`, in percentage points."""
    if math.isnan(interval.estimate):
        return "–"
    return f"{100 * interval.estimate:+.0f} [{100 * interval.low:+.0f}, {100 * interval.high:+.0f}]"


def legend(names: Sequence[str]) -> Html:
    items = [f'<span><i style="background:{_colour(i)}"></i>{escaped(name)}</span>' for i, name in enumerate(names)]
    return Html(f'<div class="legend">{"".join(items)}</div>' if len(names) > 1 else "")


def bar_chart_svg(labels: Sequence[str], series: Mapping[str, Sequence[Interval]], *, x_label: str) -> Html:
    """Horizontal bars of proportions in [0, 1] with whiskers, grouped by label, one colour per series."""
    left, width, bar, gap = 16, 432, 14, 24
    group = gap + bar * len(series) + 8
    bottom = group * len(labels) + 6
    place = lambda value: left + value * (width - left - 44)  # noqa: E731 - room for the figure at the right end
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(place(tick), 0, place(tick), bottom, "grid" if tick else "axis"))
        parts.append(_text(place(tick), bottom + 16, percent(tick), "middle"))
    parts.append(_text(place(0.5), bottom + 34, x_label, "middle"))
    for row, label in enumerate(labels):
        parts.append(_text(left + 4, row * group + 17, label, "start", "ink"))
        for i, (name, intervals) in enumerate(series.items()):
            value, y = intervals[row], row * group + gap + i * bar
            if math.isnan(value.estimate):
                continue
            tip = escaped(f"{label}, {name}: {percent_interval(value)}")
            size = f'width="{place(value.estimate) - left:.1f}" height="{bar - 3}" rx="2"'
            parts.append(f'<rect x="{left}" y="{y}" {size} fill="{_colour(i)}"><title>{tip}</title></rect>')
            middle = y + (bar - 3) / 2
            parts.append(_line(place(value.low), middle, place(value.high), middle, "whisker"))
            parts += [
                _line(place(end), middle - 3, place(end), middle + 3, "whisker") for end in (value.low, value.high)
            ]
            parts.append(_text(place(1.0) + 8, y + 10, percent(value.estimate), "start", "ink"))
    return Html(legend(list(series)) + _svg(width, bottom + 42, parts, x_label))


def line_chart_svg(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    y_percent: bool = False,
    markers: bool = True,
) -> Html:
    """Lines through (x, y) points in order, one colour per series; points that are not finite are left out.

    Up to 60 points of a line get a marker that shows its numbers, unless `markers` is False.
    """
    points = {name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for name, line in series.items()}
    every = [point for line in points.values() for point in line]
    if not every:
        return paragraph("No data.")
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = ticks(*(y_range or (min(y for _, y in every), max(y for _, y in every))))
    left, top, right, bottom = 54, 24, 432, 214
    (x0, x1), (y0, y1) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    place_x = lambda x: left + (x - x0) / (x1 - x0) * (right - left)  # noqa: E731
    place_y = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - top)  # noqa: E731
    parts = [_text(4, 12, y_label, "start"), _text((left + right) / 2, bottom + 36, x_label, "middle")]
    for tick in y_ticks:
        parts.append(_line(left, place_y(tick), right, place_y(tick), "grid"))
        parts.append(_text(left - 6, place_y(tick) + 4, percent(tick) if y_percent else f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(_text(place_x(tick), bottom + 18, f"{tick:g}", "middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    for i, (name, line) in enumerate(points.items()):
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="2" stroke-linejoin="round"/>'
        )
        for x, y in line if markers and len(line) <= 60 else ():
            tip = escaped(f"{name}: {x:g}, {y:.4g}")
            parts.append(
                f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.5" fill="{_colour(i)}"><title>{tip}</title></circle>'
            )
    return Html(legend(list(series)) + _svg(right + 12, bottom + 44, parts, f"{y_label} by {x_label}"))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose [low, high], at steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _colour(i: int) -> str:
    return f"var(--c{i % N_COLOURS})"


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> Html:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return Html(f'<svg {box} role="img" aria-label="{escaped(label)}">{"".join(parts)}</svg>')


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escaped(text)}</text>'
