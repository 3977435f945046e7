"""JPEG as TensorFlow writes and reads it, bit for bit, without TensorFlow.

Policies of the OpenVLA line are trained on frames that were stored as JPEG and read back by TensorFlow, and evaluated
on frames sent through the same two calls. Pillow writes the same file but cannot read it the same way: TensorFlow
decodes with libjpeg's fast integer inverse DCT (`fastdct`), Pillow with the accurate one, and the two differ by up to
fifteen grey levels.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError


def jpeg_round_trip(frame: np.ndarray, quality: int) -> np.ndarray:
    """uint8 RGB (h, w, 3) -> the same shape, as stored at this quality (1..100, chroma 4:2:0) and read back by
    TensorFlow: `tf.io.encode_jpeg`, then `tf.io.decode_image`."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return decode_jpeg(buffer.getvalue())


def decode_jpeg(data: bytes) -> np.ndarray:
    """A JPEG file -> uint8 RGB (h, w, 3), equal to TensorFlow's `decode_image(data, channels=3)`.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True)


def fault(error: Exception) -> str:
    """What is wrong with an image that cannot be decoded; Pillow's own words name an object in memory instead."""
    return "not of a known kind, or cut short" if isinstance(error, UnidentifiedImageError) else str(error)
