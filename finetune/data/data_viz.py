"""`vla data viz`: one episode to look at, as an MP4 or as a page that needs nothing else.

vla data viz data/demos --episode 3 --out episode3.html
"""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from vla.files import write_bytes, write_text
from vla.finetune.data.open_source import open_source
from vla.finetune.formats.cache_format import encode_jpeg
from vla.finetune.formats.lerobot_video import choose_encoder, encode_video
from vla.finetune.formats.source import FrameSource
from vla.progress import Progress
from vla.types import problem

JPEG_QUALITY = 85
MAX_PAGE_FRAMES = 600
CURVES_HEIGHT_PX = 220
MIN_WIDTH_PX = 480
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a; }
img { min-width: 320px; max-width: 100%; display: block; margin: 1rem 0; } input { width: 100%; }
svg { width: 100%; height: 220px; background: #fafafa; } button { font: inherit; } .key { margin-right: 1rem; }
"""
_SCRIPT = """
const image = document.getElementById("frame"), slider = document.getElementById("slider"),
      line = document.getElementById("cursor"), text = document.getElementById("where");
let timer = null;
function show(k) { slider.value = k; image.src = "data:image/jpeg;base64," + frames[k];
  line.setAttribute("x1", numbers[k]); line.setAttribute("x2", numbers[k]);
  text.textContent = "frame " + numbers[k] + ", " + (numbers[k] / fps).toFixed(2) + " s"; }
slider.oninput = () => show(+slider.value);
document.getElementById("play").onclick = () => { if (timer) { clearInterval(timer); timer = null; return; }
  timer = setInterval(() => show((+slider.value + 1) % frames.length), 1000 * step / fps); };
show(0);
"""


@dataclass(frozen=True)
class Settings:
    """Show one episode: frames, actions and instruction."""

    source: tyro.conf.Positional[str]
    """The dataset: a folder or file of any format."""
    out: Path
    """File to write: .html (slider, one file) or .mp4."""
    episode: int = 0
    """Which one."""
    cameras: tuple[str, ...] = ()
    """Which ones; not given: all, side by side."""
    rotation_deg: Literal[0, 90, 180, 270] = 0
    """Turn frames counter-clockwise: 180 for LIBERO's, which are stored upside down."""


def run(settings: Settings) -> Path:
    """Write the file."""
    if settings.out.suffix not in (".html", ".mp4"):
        raise problem(f"--out {settings.out}", "a name that ends in .html or .mp4", "rename it")
    source = open_source(settings.source)
    if not 0 <= settings.episode < source.n_episodes:
        raise problem(f"episode {settings.episode}", f"0..{source.n_episodes - 1} in {source.where}", "choose another")
    for camera in settings.cameras:
        source.check_camera(camera)
    if not source.cameras:
        raise problem(f"{source.where} without cameras", "frames to show", "choose other data")
    if settings.out.suffix == ".html":
        write_text(settings.out, page(source, settings))
    else:
        write_bytes(settings.out, video(source, settings))
    print(f"episode {settings.episode} of {source.name}: {settings.out}")
    return settings.out


def page(source: FrameSource, settings: Settings) -> str:
    """A self-contained page with a slider. Long episodes show every second, third, ... frame."""
    span = source.episodes[settings.episode]
    step = -(-(span.stop - span.start) // MAX_PAGE_FRAMES)
    numbers = list(range(0, span.stop - span.start, step))
    frames = []
    with Progress("frames", len(numbers)) as progress:
        for k in numbers:
            frames.append(
                base64.b64encode(encode_jpeg(_frame(source, span.start + k, settings), JPEG_QUALITY)).decode()
            )
            progress.advance()
    data = f"const frames = {json.dumps(frames)}, numbers = {json.dumps(numbers)}, fps = {source.fps or 10}, step = {step};"
    title = html.escape(f"{source.name}, episode {settings.episode}")
    return "\n".join([
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1><p>{html.escape(_caption(source, settings.episode))}</p>",
        "<img id=frame alt='frame of the episode'>",
        f"<input id=slider type=range min=0 max={len(frames) - 1} value=0 aria-label=frame>",
        "<p><button id=play>play / stop</button> <span id=where></span></p>",
        curves_svg(source.actions()[span.start : span.stop], source.action_names),
        f"<script>{data}{_SCRIPT}</script>", "",
    ])  # fmt: skip


def curves_svg(actions: np.ndarray, names: tuple[str, ...]) -> str:
    """Each dimension of (n, D) over the frames, scaled to its own range, with the key and those ranges below."""
    n, lines, keys = len(actions), [], []
    for d, name in enumerate(names):
        column = np.nan_to_num(actions[:, d].astype(np.float64))
        low, high, colour = column.min(), column.max(), _COLOURS[d % len(_COLOURS)]
        heights = 95 - 90 * (column - low) / (high - low if high > low else 1)
        points = " ".join(f"{k},{y:.1f}" for k, y in enumerate(heights))
        lines.append(f"<polyline points='{points}' fill=none stroke='{colour}' vector-effect=non-scaling-stroke />")
        keys.append(f"<span class=key style='color:{colour}'>{html.escape(name)} {low:.3g}..{high:.3g}</span>")
    cursor = "<line id=cursor x1=0 x2=0 y1=0 y2=100 stroke=black vector-effect=non-scaling-stroke />"
    view = f"viewBox='0 0 {max(n - 1, 1)} 100' preserveAspectRatio=none role=img aria-label='actions over time'"
    return f"<svg {view}>{''.join(lines)}{cursor}</svg><p>{''.join(keys)}</p>"


def video(source: FrameSource, settings: Settings) -> bytes:
    """MP4: the cameras side by side, the instruction and the action curves under them with a moving line."""
    span = source.episodes[settings.episode]
    first = _frame(source, span.start, settings)
    width = max(MIN_WIDTH_PX, first.shape[1])
    width, height = width + width % 2, first.shape[0] + first.shape[0] % 2
    curves, places = _curves(source, settings.episode, width)
    frames = []
    with Progress("frames", span.stop - span.start) as progress:
        for k in range(span.stop - span.start):
            canvas = np.full((height + CURVES_HEIGHT_PX, width, 3), 255, np.uint8)
            image = _frame(source, span.start + k, settings)
            left = (width - image.shape[1]) // 2
            canvas[: image.shape[0], left : left + image.shape[1]] = image
            canvas[height:] = curves
            canvas[height:, places[k] : places[k] + 3] = (200, 0, 0)
            frames.append(canvas)
            progress.advance()
    return encode_video(frames, max(1, round(source.fps or 10)), choose_encoder())


def _curves(source: FrameSource, episode: int, width: int) -> tuple[np.ndarray, list[int]]:
    """(uint8 (CURVES_HEIGHT_PX, width, 3), column of each frame)."""
    from matplotlib.figure import Figure
    from PIL import Image

    span = source.episodes[episode]
    actions, dpi = source.actions()[span.start : span.stop], 100
    figure = Figure(figsize=(width / dpi, CURVES_HEIGHT_PX / dpi), dpi=dpi)
    axes = figure.add_axes((0.1, 0.12, 0.72, 0.74))
    for d, name in enumerate(source.action_names):
        axes.plot(
            actions[:, d], label=name.replace("$", r"\$").lstrip("_"), color=_COLOURS[d % len(_COLOURS)], linewidth=1
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=6, frameon=False)
    axes.set_title(_caption(source, episode).replace("$", r"\$")[:90], fontsize=8)
    axes.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    image = np.asarray(Image.open(buffer).convert("RGB").resize((width, CURVES_HEIGHT_PX)))
    places = axes.transData.transform([(k, 0.0) for k in range(len(actions))])[:, 0]
    return image, [int(min(max(place, 0), width - 3)) for place in places]


def _frame(source: FrameSource, i: int, settings: Settings) -> np.ndarray:
    """uint8: the cameras of frame `i` side by side, the lower ones filled up with black."""
    images = [
        np.rot90(image, settings.rotation_deg // 90) for image in source.images(i, settings.cameras or None).values()
    ]
    height = max(image.shape[0] for image in images)
    return np.ascontiguousarray(np.concatenate(
        [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0))) for image in images], axis=1
    ))  # fmt: skip


def _caption(source: FrameSource, episode: int) -> str:
    span, success = source.episodes[episode], source.success_of(episode)
    result = "" if success is None else ", success" if success else ", failure"
    return f"{source.instruction_of(span.start) or '(no instruction)'} ({span.stop - span.start} frames{result})"
