"""MP4 in and out with PyAV: exact random access by timestamp, and encoding as LeRobot does it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from vla.types import VlaError, problem

FORWARD_FRAMES = 4  # decoding this many frames on is cheaper than seeking when every second frame is a key frame
_ENCODERS = {  # encoder -> (name in info.json, options); the first that PyAV's FFmpeg has is used
    "libsvtav1": ("av1", {"g": "2", "crf": "30", "preset": "12"}),  # lerobot's settings
    "libx264": ("h264", {"g": "2", "crf": "18", "preset": "fast", "bf": "0"}),
}


class VideoFile:
    """Frames of one MP4 by time. Keeps its decoder between calls; not safe to share between threads or over a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise problem(f"no file {path}", "an MP4 file", "copy the dataset again")
        try:
            # The container format is named, so that a file from elsewhere cannot be a playlist that opens others.
            self._container = av.open(str(path), format="mp4")
            self._stream: Any = self._container.streams.video[0]
        except (av.error.FFmpegError, OSError, IndexError) as error:
            raise self._broken(error) from error
        self._stream.codec_context.thread_count = 1  # frame threads would delay the first frame after each seek
        self._frames: Any = None
        self._last: Any = None

    def frame_at(self, time_s: float, tolerance_s: float) -> np.ndarray:
        """uint8 (height, width, 3) RGB of the frame shown at `time_s`.

        Raises:
            VlaError: no frame within `tolerance_s`, or the file is damaged.
        """
        try:
            frame = self._find(time_s, tolerance_s)
            if frame is None or abs(frame.time - time_s) > tolerance_s:
                near = "the file ends before it" if frame is None else f"the nearest is at {frame.time:.6f} s"
                raise problem(f"no frame at {time_s:.6f} s in {self.path}: {near}", f"one within {tolerance_s:g} s",
                              "the video is cut short or does not belong to this data: copy it again")  # fmt: skip
            return frame.to_ndarray(format="rgb24")
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error) from error

    def close(self) -> None:
        self._container.close()

    def _find(self, time_s: float, tolerance_s: float) -> Any:
        """The first frame at or after `time_s` - tolerance; None at the end of the file."""
        if self._last is not None:
            ahead = time_s - self._last.time
            if abs(ahead) <= tolerance_s:
                return self._last
            if 0 < ahead <= FORWARD_FRAMES / float(self._stream.average_rate or 1):
                return self._decode_until(time_s - tolerance_s)
        for back_s in (0.0, 1.0, 10.0, float("inf")):  # with B-frames a seek by dts may land just after the frame
            start_s = max(0.0, time_s + tolerance_s - back_s)
            self._seek(start_s)
            frame = self._decode_until(time_s - tolerance_s)
            if (frame is not None and frame.time <= time_s + tolerance_s) or start_s == 0.0:
                return frame
        return None

    def _seek(self, time_s: float) -> None:
        self._last = None
        self._container.seek(int(time_s / float(self._stream.time_base)), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)

    def _decode_until(self, time_s: float) -> Any:
        for frame in self._frames:
            self._last = frame
            if frame.time is not None and frame.time >= time_s:
                return frame
        self._last = None  # the decoder has been drained: the next call must seek
        return None

    def _broken(self, error: Exception) -> VlaError:
        size = self.path.stat().st_size
        return problem(f"{self.path} ({size} bytes): {error}", "a whole MP4 file", "the file is damaged: copy it again")


def choose_encoder() -> str:
    """AV1 where this FFmpeg has it, else H.264; recorded in info.json as `video.codec`."""
    for name in _ENCODERS:
        try:
            av.Codec(name, "w")
        except (av.error.FFmpegError, ValueError):
            continue
        return name
    raise problem("PyAV without a video encoder", " or ".join(_ENCODERS), "use image_mode='image' or another PyAV")


def video_info(encoder: str, height: int, width: int, fps: int) -> dict[str, Any]:
    """The `info` entry of a video feature."""
    codec, options = _ENCODERS[encoder]
    return {
        "video.height": height, "video.width": width, "video.codec": codec, "video.pix_fmt": "yuv420p",
        "video.fps": fps, "video.channels": 3, "has_audio": False, "video.g": int(options["g"]),
        "video.crf": int(options["crf"]), "video.preset": int(options["preset"]) if codec == "av1" else options["preset"],
        "video.fast_decode": 0, "video.video_backend": "pyav", "video.extra_options": {}, "is_depth_map": False,
    }  # fmt: skip


def encode_video(frames: Sequence[np.ndarray], fps: int, encoder: str) -> bytes:
    """uint8 (height, width, 3) frames -> MP4, frame k at exactly k / fps seconds."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; the encoder otherwise prints 20 lines per file
    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(encoder, rate=fps, options=_ENCODERS[encoder][1])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
