"""TensorFlow's image resampling in numpy: `tf.image.resize(method="lanczos3", antialias=True)` and `crop_and_resize`.

Pillow's Lanczos rounds (and clips) to bytes between its two passes and differs by up to 25 grey levels; TensorFlow keeps
float32 throughout and rounds once. Sums are taken tap by tap, in TensorFlow's order, so that the roundings agree.
"""

from __future__ import annotations

import functools

import numpy as np

LANCZOS_RADIUS = np.float32(3.0)
CROP_ROWS = 32  # at a time: what is in between stays in the processor's cache
# sincosf_data.c: coefficients of the odd powers from 3, and of the even powers from 2.
SINE = tuple(map(float.fromhex, ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13")))
COSINE = tuple(map(float.fromhex, (
    "-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5", "-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16",
)))  # fmt: skip


def resize_lanczos3(frame: np.ndarray, height: int, width: int, crop_area: float = 1.0) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (height, width, 3): rows first, then columns, one rounding (half to even).

    With `crop_area` below 1 only the centre is shown, which TensorFlow would call a scale and a translation.
    """
    rows = _gather(frame.astype(np.float32), height, crop_area**0.5)
    both = _gather(rows.swapaxes(0, 1), width, crop_area**0.5).swapaxes(0, 1)
    return np.clip(np.rint(both), 0, 255).astype(np.uint8)


def crop_and_resize(frame: np.ndarray, area: float, height: int, width: int) -> np.ndarray:
    """Centre crop of this share of the area, bilinearly resized with the corners of box and result aligned.

    As OpenVLA calls `tf.image.crop_and_resize`: pixels as floats in [0, 1], then back to bytes with 255.5 x, truncated.
    """
    side = np.sqrt(np.float32(area))
    low = (np.float32(1.0) - side) / np.float32(2.0)
    image = frame.astype(np.float32) * np.float32(1.0 / 255.0)
    out = crop_box(image, (low, low, low + side, low + side), height, width)
    return np.clip(np.clip(out, 0.0, 1.0) * np.float32(255.5), 0, 255).astype(np.uint8)


def crop_box(
    image: np.ndarray, box: tuple[np.float32, np.float32, np.float32, np.float32], height: int, width: int
) -> np.ndarray:
    """float32 (h, w, 3) -> (height, width, 3): `box` (top, left, bottom, right; shares of the sides) resized bilinearly,
    its corners on the corners, as `tf.image.crop_and_resize`."""
    top, bottom, down = _aligned(box[0], box[2], image.shape[0], height)
    left, right, across = _aligned(box[1], box[3], image.shape[1], width)
    across = np.repeat(across, image.shape[2])
    out = np.empty((height, width * image.shape[2]), np.float32)
    for start in range(0, height, CROP_ROWS):
        part = slice(start, start + CROP_ROWS)
        low, high = top[part].min(), bottom[part].max() + 1
        rows = image[low:high]
        first = np.take(rows, left, axis=1).reshape(len(rows), -1)  # one long dimension, numpy's inner loop
        columns = np.take(rows, right, axis=1).reshape(len(rows), -1)
        columns -= first
        columns *= across
        columns += first
        upper, lower = columns[top[part] - low], columns[bottom[part] - low]
        lower -= upper
        lower *= down[part, None]
        np.add(upper, lower, out=out[part])
    return out.reshape(height, width, image.shape[2])


def _aligned(low: np.float32, high: np.float32, size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output position: the two source indices, and the share of the second. crop_and_resize_op.cc."""
    last = np.float32(size - 1)
    if out_size == 1:
        places = np.float32(0.5) * (low + high) * last * np.ones(1, np.float32)
    else:
        scale = (high - low) * last / np.float32(out_size - 1)
        places = low * last + np.arange(out_size, dtype=np.float32) * scale
    first = np.floor(places)
    return first.astype(np.intp), np.ceil(places).astype(np.intp), places - first


def _gather(image: np.ndarray, out_size: int, side: float) -> np.ndarray:
    """float32 (n, ...) -> (out_size, ...) along axis 0, of which this share in the middle is shown."""
    indices, weights = _spans(image.shape[0], out_size, side)
    out = np.zeros((out_size, *image.shape[1:]), np.float32)
    for tap in range(indices.shape[1]):
        out += weights[:, tap, None, None] * image[indices[:, tap]]
    return out


@functools.cache
def _spans(size: int, out_size: int, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and weights, both (out_size, taps). scale_and_translate_op.cc, `ComputeSpansCore`."""
    inverse = np.float32(1.0) / (np.float32(out_size) / np.float32(side * size))
    stretch = max(inverse, np.float32(1.0))  # antialias: the kernel is widened when shrinking
    left = np.float32((1.0 - side) / 2.0 * size)
    centre = (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * inverse + left
    reach = LANCZOS_RADIUS * stretch
    start = np.clip(np.ceil(centre - reach - np.float32(0.5)), 0, size - 1).astype(np.intp)
    end = np.clip(np.floor(centre + reach - np.float32(0.5)), 0, size - 1).astype(np.intp) + 1
    indices = start[:, None] + np.arange((end - start).max())
    distance = (indices.astype(np.float32) + np.float32(0.5) - centre[:, None]) * (np.float32(1.0) / stretch)
    weights = np.where(indices < end[:, None], _lanczos(np.abs(distance)), np.float32(0.0))
    total = np.zeros(out_size, np.float32)
    for tap in range(weights.shape[1]):
        total += weights[:, tap]
    return np.minimum(indices, size - 1), weights * (np.float32(1.0) / total)[:, None]


def _lanczos(x: np.ndarray) -> np.ndarray:
    """float32. sin(pi x) sin(pi x / 3) / (pi^2 x^2 / 3) inside 3, 1 around 0."""
    pi = np.float32(np.pi)
    safe = np.where(x <= 1e-3, np.float32(1.0), x)
    value = LANCZOS_RADIUS * _sin(pi * safe) * _sin(pi * safe / LANCZOS_RADIUS) / (pi * pi * safe * safe)
    return np.where(x <= 1e-3, np.float32(1.0), np.where(x > LANCZOS_RADIUS, np.float32(0.0), value))


def _sin(x: np.ndarray) -> np.ndarray:
    """float32 sine of 0 <= x < 120 as the C library's `sinf` (glibc, s_sinf.c) gives it.

    numpy's own depends on the processor, and a weight that is off in its last bit turns a pixel here and there by one.
    """
    wide = x.astype(np.float64)
    quarter = ((wide * float.fromhex("0x1.45F306DC9C883p+23")).astype(np.int64) + (1 << 23)) >> 24
    y = wide - quarter * (np.pi / 2)  # |y| <= pi / 4
    y = np.where(quarter & 2, -y, y)
    square = y * y
    cube = y * square
    sine = y + cube * SINE[0] + cube * square * (SINE[1] + square * SINE[2])
    fourth = square * square
    cosine = 1.0 + square * COSINE[0] + fourth * COSINE[1] + fourth * square * (COSINE[2] + square * COSINE[3])
    return np.where(quarter & 1, np.where(quarter & 2, -cosine, cosine), sine).astype(np.float32)
