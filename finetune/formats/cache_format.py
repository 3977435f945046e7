"""The files of our own cache of a dataset, as its writer and its reader both need them.

    cache.json                          what it holds, written last: a folder without it is unfinished
    writing.json                        the same settings while it is being written
    episodes.jsonl                      one row per episode, appended when all its frames are on disk
    columns/{action,state,reward,instruction}.npy
    images/00_{camera}/shard-00000.npy                 raw: uint8 (n, height, width, 3), memory-mapped
    images/00_{camera}/shard-00000.{jpg,offsets.npy}   jpeg: files end to end, and int64 (n + 1) where each begins

Every shard but a camera's last holds the same number of frames, so frame `i` is found by one division.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

import vla.jpeg
from vla.finetune.formats.source import FrameSource
from vla.inputs import FILTERS, prepare_image
from vla.spec import ImageSpec
from vla.types import VlaError, problem

FORMAT, VERSION = "vla-cache", 1
CACHE_JSON, WRITING_JSON, EPISODES_JSONL = "cache.json", "writing.json", "episodes.jsonl"
HEADER_BYTES = 128
"""Of every .npy here: long enough for any shape, so that the number of rows can be filled in at the end."""
INFO_KEYS = ("action_names", "cameras", "files", "fps", "has_rewards", "instructions", "jpeg_decoder", "n_episodes",
             "n_frames", "name", "settings", "state_names")  # fmt: skip
"""Of cache.json, beside format and version."""
JPEG_SHRINKS = 8
"""How much smaller than raw a JPEG is taken to be when frames are dealt out to shards."""


@dataclass(frozen=True)
class CacheSettings:
    """All that shapes the pixels of a cache."""

    kind: Literal["raw", "jpeg"] = "raw"
    quality: int = 95
    """Of JPEG, 1..100, chroma halved; frames that are stored as JPEG already keep their bytes unless resized."""
    size_px: int | None = None
    """Frames become squares of this side, as a policy with this `ImageSpec.size_px` would make them; None: as they are."""
    resize_filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "lanczos3"] = "lanczos"
    shard_mb: int = 512
    """About the size of one shard, MiB."""

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "jpeg"):
            raise problem(f"kind {self.kind!r}", "raw or jpeg", "choose one of them")
        if not 1 <= self.quality <= 100:
            raise problem(f"quality {self.quality}", "1..100", "choose 95, TensorFlow's default")
        if self.size_px is not None and self.size_px < 1 or self.shard_mb < 1:
            raise problem(f"size_px {self.size_px}, shard_mb {self.shard_mb}", "at least 1", "raise them")
        if self.resize_filter not in (*FILTERS, "lanczos3"):
            raise problem(
                f"resize_filter {self.resize_filter!r}", f"one of {', '.join(FILTERS)}, lanczos3", "correct it"
            )

    def shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(height, width, 3) of a frame that comes in as `shape`."""
        return shape if self.size_px is None else (self.size_px, self.size_px, 3)

    def frames_per_shard(self, shape: tuple[int, int, int]) -> int:
        """Of a camera whose stored frames have this shape."""
        frame_bytes = int(np.prod(shape)) // (JPEG_SHRINKS if self.kind == "jpeg" else 1)
        return max(1, self.shard_mb * 2**20 // max(1, frame_bytes))


def jpeg_decoder(source: FrameSource) -> Decoder | None:
    """How `source` turns the JPEG files it has into pixels, found out by comparison; None if in neither of the two ways.

    Pillow's and TensorFlow's differ by up to ten grey levels: a cache that keeps the files must read them alike.
    """
    for span in source.episodes:
        for camera in source.cameras:
            try:
                own, pixels = source.jpeg(span.start, camera), source.images(span.start, [camera])[camera]
            except VlaError:  # a bad episode; it is reported when it is converted
                continue
            if own is not None:
                alike: list[Decoder] = [
                    name for name in DECODERS if np.array_equal(decode_jpeg(own, "", pixels.shape, name), pixels)
                ]
                return alike[0] if alike else None
        if span.index >= DECODER_EPISODES:
            break
    return "pillow"


def encode_frame(
    source: FrameSource, i: int, camera: str, settings: CacheSettings, decoder: Decoder | None = "pillow"
) -> bytes:
    """Frame `i` as the cache stores it. `decoder`: of `jpeg_decoder`; None: files that are JPEG already are not kept.

    Raises:
        VlaError: it cannot be decoded, or has another shape than the camera's.
    """
    if settings.kind == "jpeg" and settings.size_px is None and decoder is not None:
        own = source.jpeg(i, camera)
        if own is not None:
            decode_jpeg(own, f"frame {i}, camera {camera} of {source.where}", source.image_shape(camera), "pillow")
            return own
    image = source.images(i, [camera])[camera]
    expected = source.image_shape(camera)
    if image.shape != tuple(expected) or image.dtype != np.uint8:
        raise problem(f"{image.dtype} {image.shape} at frame {i}, camera {camera} of {source.where}", f"uint8 {expected}",
                      "drop the episode, or skip it")  # fmt: skip
    if settings.size_px is not None:
        image = np.asarray(prepare_image(image, ImageSpec((camera,), settings.size_px, settings.resize_filter)))
    return image.tobytes() if settings.kind == "raw" else encode_jpeg(image, settings.quality)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 (height, width, 3) RGB -> JPEG, chroma halved (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def decode_jpeg(data: bytes, where: str, shape: tuple[int, ...], decoder: Decoder) -> np.ndarray:
    """JPEG -> uint8 `shape`; VlaError naming `where` if it is damaged or of another shape."""
    try:
        image = DECODERS[decoder](data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise problem(
            f"{where}: {vla.jpeg.fault(error)}", "a JPEG image", "the frame is damaged: write the cache again"
        ) from error
    if image.shape != tuple(shape):
        raise problem(f"{where}: {image.shape}", f"{tuple(shape)}", "the frame is damaged: write the cache again")
    return image


def _pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as file:
        return np.array(file.convert("RGB"))


Decoder = Literal["pillow", "tensorflow"]
DECODERS: dict[Decoder, Callable[[bytes], np.ndarray]] = {"pillow": _pillow, "tensorflow": vla.jpeg.decode_jpeg}
DECODER_EPISODES = 20
"""Episodes that are looked at for a JPEG file; sources have them everywhere or nowhere."""


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first `HEADER_BYTES` of a .npy (format 1.0) of C-ordered `shape`."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}"
    head = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return head + text.encode().ljust(HEADER_BYTES - 11) + b"\n"


def camera_folder(root: Path, number: int, camera: str) -> Path:
    """A camera's folder; its name may hold anything, the folder's may not."""
    return root / "images" / f"{number:02d}_{re.sub(r'[^A-Za-z0-9_-]', '_', camera)}"


def shard_files(folder: Path, shard: int, kind: str) -> tuple[Path, ...]:
    """(.npy,) of raw shards; (.jpg, .offsets.npy) of JPEG's."""
    stem = f"shard-{shard:05d}"
    return (folder / f"{stem}.npy",) if kind == "raw" else (folder / f"{stem}.jpg", folder / f"{stem}.offsets.npy")


def source_hash(source: FrameSource) -> str:
    """16 hex digits that change with the data: names, rates, shapes, episodes, instructions, every number; not its place.

    Pixels are left out: reading them all would take as long as the conversion.
    """
    facts = {
        "name": source.name, "fps": source.fps, "cameras": {c: list(source.image_shape(c)) for c in source.cameras},
        "action_names": list(source.action_names), "state_names": list(source.state_names),
        "stops": [span.stop for span in source.episodes],
        "instructions": [source.instruction_of(span.start) for span in source.episodes],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts).encode())
    for values in (source.actions(), source.states(), source.rewards()):
        digest.update(b"-" if values is None else np.ascontiguousarray(values, np.float32).tobytes())
    return digest.hexdigest()[:16]


def file_entry(path: Path) -> dict[str, Any]:
    """{bytes, sha256} of a file, for cache.json."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def wrong_files(root: Path, info: dict[str, Any]) -> dict[Path, VlaError]:
    """The files that `cache.json` lists and that are not of the length it says, and what to tell the user of each."""
    found = {}
    for name, entry in info["files"].items():
        file = root / name
        got = file.stat().st_size if file.is_file() else None
        if got != entry["bytes"]:
            found[file] = problem(
                f"{file} {'missing' if got is None else f'of {got} bytes'}", f"{entry['bytes']} bytes",
                "it was cut short or not copied: copy it again, or write the cache again",
            )  # fmt: skip
    return found


def read_cache_json(root: Path, check_files: bool = True) -> dict[str, Any]:
    """`cache.json`; unless `check_files` is False, every file it lists is of the length it says.

    Raises:
        VlaError: no cache, an unfinished one, another version, or a file that is missing or cut short (it is named).
    """
    path = root / CACHE_JSON
    if not path.is_file():
        if (root / WRITING_JSON).is_file():
            raise problem(f"an unfinished cache in {root}", f"one with {CACHE_JSON}, which is written last",
                          "give the same `vla data convert` command again: it continues")  # fmt: skip
        raise problem(f"no {path}", "the folder of a cache", "make one with `vla data convert --to cache`")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "write the cache again") from error
    found = (info.get("format"), info.get("version")) if isinstance(info, dict) else None
    if found != (FORMAT, VERSION):
        raise problem(f"{path}: format and version {found}", f"{(FORMAT, VERSION)}", "write the cache again")
    missing = [key for key in INFO_KEYS if key not in info]
    if missing or not isinstance(info["files"], dict):
        raise problem(f"{path} without {', '.join(missing) or 'a table of files'}", f"{', '.join(INFO_KEYS)}",
                      "write the cache again")  # fmt: skip
    for fault in wrong_files(root, info).values() if check_files else ():
        raise fault
    return info
