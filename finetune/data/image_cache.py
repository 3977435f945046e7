"""All frames of a training set, decoded once and kept in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vla.finetune.formats.source import FrameSource, Unreachable
from vla.types import VlaError, problem


def decode_all(
    sources: Sequence[tuple[str, FrameSource]],
    keys: Sequence[Mapping[str, str]],
    decode: Callable[[int, int], dict[str, np.ndarray]],
    bad_frames: dict[tuple[int, int], str] | None,
) -> list[dict[str, np.ndarray]]:
    """For each source, camera -> uint8 (its frames, height, width, 3).

    Args:
        keys: of each source, the policy's name of a camera -> the source's.
        decode: (source, frame) -> images by the policy's names.
        bad_frames: takes (source, frame) -> why it cannot be decoded; None: the first such frame is an error.

    Raises:
        VlaError: more than the memory that is free holds, frames of different sizes, or one that cannot be decoded.
    """
    shapes = [{camera: (len(source), *source.image_shape(key)) for camera, key in named.items()}
              for (_, source), named in zip(sources, keys, strict=True)]  # fmt: skip
    needed = sum(int(np.prod(shape)) for by_camera in shapes for shape in by_camera.values())
    free = available_bytes()
    if needed > 0.8 * free:
        raise problem(f"{needed / 2**30:.1f} GiB of images to cache", f"at most 80 % of the {free / 2**30:.1f} GiB free",
                      "pass --no-cache-images, or set cache_images to False")  # fmt: skip
    cache = [{camera: np.empty(shape, np.uint8) for camera, shape in by_camera.items()} for by_camera in shapes]
    for s, (_, source) in enumerate(sources):
        for frame in range(len(source)):
            try:
                found = decode(s, frame)
                _check_shapes(found, cache[s], f"frame {frame} of {source.where}")
            except Unreachable:
                raise
            except VlaError as error:
                if bad_frames is None:
                    raise
                bad_frames[s, frame] = str(error)
                continue
            for camera, image in found.items():
                cache[s][camera][frame] = image
    return cache


def _check_shapes(images: dict[str, np.ndarray], cache: dict[str, np.ndarray], where: str) -> None:
    for camera, image in images.items():
        if image.shape != cache[camera].shape[1:]:
            raise problem(f"{where}: camera {camera!r} of shape {image.shape}", f"{cache[camera].shape[1:]}",
                          "leave the episode out, or pass --no-cache-images")  # fmt: skip


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
