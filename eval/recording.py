"""What is kept of an episode: a row of numbers, and a film or a still to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vla.eval.results import EpisodeRow
from vla.eval.video import write_video
from vla.files import write_bytes
from vla.rollout import side_by_side
from vla.types import EpisodeResult, Suite

MAX_VIDEO_FPS = 20.0
VIDEO_SIZE_PX = 320
JPEG_QUALITY = 90


def record(out: Path, suite: Suite, result: EpisodeResult, video_every_steps: int) -> EpisodeRow:
    """Write the episode's film if it has one, else the last frame of a failure; returns its row.

    Args:
        result: its request's tags hold the episode's `index`; its queries are kept.
        video_every_steps: at which steps the frames were taken.
    """
    request, index = result.request, int(result.request.tags["index"])
    latency = tuple(round(query.latency_ms, 3) for query in result.queries)
    motions = tuple(query.chunk.motion for query in result.queries if query.chunk.motion)
    video, last_frame = None, None
    if result.frames and result.fault is None:
        video = f"videos/{request.task}-{index}-{'success' if result.success else 'failure'}.mp4"
        fps = min(MAX_VIDEO_FPS, suite.control_hz / video_every_steps)
        frames = [upright(frame, suite) for frame in result.frames]
        upscale = max(1, VIDEO_SIZE_PX // suite.image_size_px)
        write_video(out / video, frames, fps, upscale=upscale, border=result.success)
    elif not result.success and result.queries and result.queries[-1].observation.images:
        last_frame = f"frames/{request.task}-{index}.jpg"
        write_bytes(out / last_frame, _jpeg(upright(side_by_side(result.queries[-1].observation, suite), suite)))
    return EpisodeRow(
        request.task, index, request.seed, result.success, result.n_steps, result.undecodable, result.fault,
        round(result.wall_s, 3), latency, video, last_frame, motions,
    )  # fmt: skip


def upright(frame: np.ndarray, suite: Suite) -> np.ndarray:
    """A frame as a person wants to see it."""
    return frame[::-1] if suite.frames_upside_down else frame


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
