"""What a picture becomes by TensorFlow's `encode_jpeg` followed by `decode_image`, bit for bit, without TensorFlow.

Policies of the OpenVLA line are trained on frames that were stored as JPEG and read back by TensorFlow, and evaluated
on frames sent through the same two calls. Pillow writes the same file but cannot read it the same way: TensorFlow
decodes with libjpeg's fast integer inverse DCT, Pillow with the accurate one, and the two differ by up to ten grey
levels. So the lossy part of JPEG (no entropy coding, which loses nothing) is computed here.

Every formula is integer arithmetic of libjpeg(-turbo), named at its function. Chroma is subsampled 4:2:0.
"""

from __future__ import annotations

import numpy as np

from vla.types import problem

MIN_SIDE_PX = 8
"""Below it libjpeg takes another path for chroma."""

# ITU-T T.81, tables K.1 and K.2.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
CHROMA = np.array([
    [17, 18, 24, 47, 99, 99, 99, 99], [18, 21, 26, 66, 99, 99, 99, 99], [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99], *[[99] * 8] * 4,
])  # fmt: skip
# jddctmgr.c: 2^14 times the scale factors of the Arai-Agui-Nakajima DCT.
AAN_COSINES = np.array([1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100, 0.275899379])
AAN_SCALES = np.rint(np.outer(AAN_COSINES, AAN_COSINES) * 2**14).astype(np.int64)


def jpeg_round_trip(frame: np.ndarray, quality: int) -> np.ndarray:
    """uint8 RGB (h, w, 3) -> the same shape, as stored at this quality (1..100) and read back by TensorFlow."""
    height, width = frame.shape[:2]
    if min(height, width) < MIN_SIDE_PX:
        raise problem(f"a frame of {width} x {height} px for JPEG", f"at least {MIN_SIDE_PX} px a side",
                      "set `image.jpeg_quality` to null")  # fmt: skip
    luma, blue, red = _ycc(frame.astype(np.int32))
    luma_table, chroma_table = quantization_table(LUMA, quality), quantization_table(CHROMA, quality)
    y = _code(_pad(luma, 8, 8), luma_table)[:height, :width]
    small_height, small_width = (height + 1) // 2, (width + 1) // 2
    chroma = [_code(_halve(plane), chroma_table)[:small_height, :small_width] for plane in (blue, red)]
    cb, cr = (_double(plane)[:height, :width] for plane in chroma)
    return _rgb(y, cb, cr)


def quantization_table(base: np.ndarray, quality: int) -> np.ndarray:
    """int (8, 8), 1..255. jcparam.c, `jpeg_quality_scaling` and `jpeg_add_quant_table`."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((base * percent + 50) // 100, 1, 255)


def _ycc(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """jccolor.c, `rgb_ycc_convert`: 16-bit fixed point."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    half, offset = 1 << 15, (128 << 16) + (1 << 15) - 1
    luma = (19595 * r + 38470 * g + 7471 * b + half) >> 16
    blue = (-11059 * r - 21709 * g + 32768 * b + offset) >> 16
    red = (32768 * r - 27439 * g - 5329 * b + offset) >> 16
    return luma, blue, red


def _rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """jdcolor.c, `ycc_rgb_convert`."""
    half = 1 << 15
    b, r = cb - 128, cr - 128
    planes = (
        y + ((91881 * r + half) >> 16),
        y + ((-22554 * b - 46802 * r + half) >> 16),
        y + ((116130 * b + half) >> 16),
    )
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def _pad(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """To multiples of `rows` and `columns`, by repeating the last ones."""
    height, width = plane.shape
    return np.pad(plane, ((0, -height % rows), (0, -width % columns)), mode="edge")


def _halve(plane: np.ndarray) -> np.ndarray:
    """Full-size chroma -> half size, padded to whole blocks. jcsample.c, `h2v2_downsample`."""
    padded = _pad(plane, 2, 16)
    total = padded[::2, ::2] + padded[::2, 1::2] + padded[1::2, ::2] + padded[1::2, 1::2]
    bias = 1 + np.arange(total.shape[1]) % 2  # 1, 2, 1, 2: halves are rounded down and up in turn
    return _pad((total + bias) >> 2, 8, 8)


def _double(plane: np.ndarray) -> np.ndarray:
    """Half-size chroma -> full size by a triangle filter. jdsample.c, `h2v2_fancy_upsample`."""
    height, width = plane.shape
    around = np.pad(plane, 1, mode="edge")
    rows = np.empty((2 * height, width + 2), plane.dtype)
    rows[::2] = 3 * around[1:-1] + around[:-2]
    rows[1::2] = 3 * around[1:-1] + around[2:]
    out = np.empty((2 * height, 2 * width), plane.dtype)
    out[:, ::2] = (3 * rows[:, 1:-1] + rows[:, :-2] + 8) >> 4
    out[:, 1::2] = (3 * rows[:, 1:-1] + rows[:, 2:] + 7) >> 4
    return out


def _code(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A plane (multiples of 8) through forward DCT, quantization and inverse DCT: 0..255."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(1, 3, 0, 2).reshape(8, 8, -1) - 128  # (row, col, n)
    coefficients = _forward(_forward(blocks.swapaxes(0, 1), first=True).swapaxes(0, 1), first=False)
    divisor = 8 * table[:, :, None]  # the forward DCT's output is 8 times the true one
    quantized = np.sign(coefficients) * ((np.abs(coefficients) + divisor // 2) // divisor)
    # jddctmgr.c, JDCT_IFAST: the quantization step times the AAN scale, with 2 fraction bits.
    step = ((table * AAN_SCALES + (1 << 11)) >> 12).astype(np.int32)[:, :, None]
    pixels = _inverse(_inverse(quantized * step).swapaxes(0, 1)).swapaxes(0, 1) >> 5
    grid = np.clip(pixels + 128, 0, 255).reshape(8, 8, height // 8, width // 8)
    return grid.transpose(2, 0, 3, 1).reshape(height, width)


def _forward(x: np.ndarray, *, first: bool) -> np.ndarray:
    """One pass of jfdctint.c (accurate integer DCT) along axis 0 of (8, ...)."""
    t0, t1, t2, t3 = x[0] + x[7], x[1] + x[6], x[2] + x[5], x[3] + x[4]
    t7, t6, t5, t4 = x[0] - x[7], x[1] - x[6], x[2] - x[5], x[3] - x[4]
    shift = 13 - 2 if first else 13 + 2

    def scaled(value: np.ndarray) -> np.ndarray:
        return (value + (1 << (shift - 1))) >> shift

    a, d, b, c = t0 + t3, t0 - t3, t1 + t2, t1 - t2
    even = ((a + b) << 2, (a - b) << 2) if first else ((a + b + 2) >> 2, (a - b + 2) >> 2)
    z = (c + d) * 4433
    z1, z2, z3, z4 = t4 + t7, t5 + t6, t4 + t6, t5 + t7
    z5 = (z3 + z4) * 9633
    z1, z2, z3, z4 = z1 * -7373, z2 * -20995, z3 * -16069 + z5, z4 * -3196 + z5
    return np.stack((
        even[0], scaled(t7 * 12299 + z1 + z4), scaled(z + d * 6270), scaled(t6 * 25172 + z2 + z3),
        even[1], scaled(t5 * 16819 + z2 + z4), scaled(z - c * 15137), scaled(t4 * 2446 + z1 + z3),
    ))  # fmt: skip


def _inverse(x: np.ndarray) -> np.ndarray:
    """One pass of jidctfst.c (fast integer inverse DCT) along axis 0 of (8, ...); products drop their 8 fraction bits."""
    sum04, difference04, sum26 = x[0] + x[4], x[0] - x[4], x[2] + x[6]
    difference26 = (((x[2] - x[6]) * 362) >> 8) - sum26
    e0, e3 = sum04 + sum26, sum04 - sum26
    e1, e2 = difference04 + difference26, difference04 - difference26
    z13, z10, z11, z12 = x[5] + x[3], x[5] - x[3], x[1] + x[7], x[1] - x[7]
    o7 = z11 + z13
    z5 = ((z10 + z12) * 473) >> 8
    o6 = ((z10 * -669) >> 8) + z5 - o7
    o5 = (((z11 - z13) * 362) >> 8) - o6
    o4 = ((z12 * 277) >> 8) - z5 + o5
    return np.stack((e0 + o7, e1 + o6, e2 + o5, e3 - o4, e3 + o4, e2 - o5, e1 - o6, e0 - o7))
