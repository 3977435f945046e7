"""Roll-outs as MP4 files that every browser plays (H.264, yuv420p)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from vla.files import write_bytes
from vla.types import problem


def write_video(
    path: Path, frames: Sequence[np.ndarray], fps: float, *, upscale: int = 2, border: bool | None = None
) -> None:
    """Encode uint8 (height, width, 3) frames.

    Args:
        upscale: pixels are repeated so often, so that small frames stay sharp.
        border: True draws a green frame around the last picture, False a red one; held for half a second.
    """
    if not frames:
        raise problem("no frames", "at least one", "run with keep_frames")
    pictures = [np.repeat(np.repeat(frame, upscale, 0), upscale, 1) for frame in frames]
    pictures = [picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2] for picture in pictures]  # yuv420p
    if border is not None:
        pictures += [_framed(pictures[-1], (40, 160, 60) if border else (200, 50, 50))] * max(1, round(fps / 2))
    write_bytes(path, encode(pictures, fps))


def encode(pictures: Sequence[np.ndarray], fps: float) -> bytes:
    """H.264 in MP4. Heights and widths are even."""
    import av

    buffer = io.BytesIO()
    height, width = pictures[0].shape[:2]
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "24", "preset": "veryfast", "threads": "1"}
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _framed(picture: np.ndarray, colour: tuple[int, int, int], width_px: int = 6) -> np.ndarray:
    framed = np.empty_like(picture)
    framed[:] = colour
    inside = slice(width_px, -width_px)
    framed[inside, inside] = picture[inside, inside]
    return framed
