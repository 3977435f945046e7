"""`vla data convert`: a dataset of any format becomes LeRobot v3.0 or our own fast cache.

    vla data convert data/demos --to cache --out data/demos.cache --size-px 224
    vla data convert path/to/tfds/dataset --to lerobot --out data/lerobot --skip-bad

Killed at any moment and started again, it continues with the first episode that is not on disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from vla.files import append_jsonl, read_jsonl, write_json, write_text
from vla.finetune.data.open_source import open_source
from vla.finetune.data.subset_source import SubsetSource, parse_range
from vla.finetune.formats.cache_format import CACHE_JSON, CacheSettings, encode_frame, source_hash
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.cache_verify import verify_cache
from vla.finetune.formats.cache_writer import CacheWriter, check_numbers
from vla.finetune.formats.lerobot_format import encode_png
from vla.finetune.formats.lerobot_verify import verify_lerobot
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.unfinished import begin, command_of, end, is_new, locked, read_object
from vla.inputs import prepare_image
from vla.progress import Progress
from vla.spec import ImageSpec
from vla.types import Episode, VlaError, problem

CONVERT_JSON = "convert.json"
SAMPLE_FRAMES = 8
"""Encoded to estimate a size."""


@dataclass(frozen=True)
class Settings:
    """Convert a dataset of any format to LeRobot v3.0 or to the fast cache."""

    source: tyro.conf.Positional[str]
    """The dataset: a folder or file of any format `vla data inspect` opens."""
    to: Literal["lerobot", "cache"]
    """`lerobot`: LeRobotDataset v3.0. `cache`: our own, memory-mapped, the fastest to train from."""
    out: Path
    """Folder to write. If it holds the beginning of this conversion, that is continued."""
    images: Literal["raw", "jpeg", "png", "video"] | None = None
    """How frames are stored. Cache: `raw` (default; pixels) or `jpeg`. LeRobot: `png` (default; exact) or `video` (lossy)."""
    jpeg_quality: int = 95
    """Of a JPEG cache. Frames that are stored as JPEG already keep their bytes, unless they are resized."""
    episodes: str = ""
    """Which ones: 0:100, 5:, -20:, 0:100:2 or 1,4,7; not given: all."""
    cameras: tuple[str, ...] = ()
    """Which ones; not given: all."""
    size_px: int | None = None
    """Resize frames to squares of this side, as a policy with this image size would; not given: as they are."""
    resize_filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "lanczos3"] = "lanczos"
    """The policy's filter."""
    fps: int | None = None
    """Control rate to write, where the data has none or not a whole one (LeRobot only)."""
    instruction: str | None = None
    """Written where an episode has none (LeRobot only)."""
    skip_bad: bool = False
    """Leave out episodes that cannot be read; they are counted and listed in OUT.bad.jsonl."""
    verify: bool = False
    """Read everything again when done, or of a finished dataset, and compare it with the source."""
    dry_run: bool = False
    """Print counts and the estimated size, and stop."""

    def __post_init__(self) -> None:
        if self.images not in (None, *(("raw", "jpeg") if self.to == "cache" else ("png", "video"))):
            raise problem(f"--images {self.images} --to {self.to}", "raw or jpeg for a cache, png or video for lerobot",
                          "correct --images")  # fmt: skip
        if self.fps is not None and self.fps < 1:
            raise problem(f"fps {self.fps}", "at least 1", "correct --fps")

    @property
    def cache(self) -> CacheSettings:
        kind = "jpeg" if self.images == "jpeg" else "raw"
        return CacheSettings(kind, self.jpeg_quality, self.size_px, self.resize_filter)


@dataclass(frozen=True)
class Converted:
    """What a conversion amounts to."""

    out: Path
    n_episodes: int
    n_frames: int
    n_new: int
    """Episodes written by this run."""
    n_bad: int
    """Episodes left out, this run's and earlier ones'."""


def run(settings: Settings) -> Converted:
    """Convert, or continue.

    Raises:
        VlaError: the folder holds something else, or an episode cannot be read and `skip_bad` is False.
    """
    source = open_source(settings.source, skip_bad=settings.skip_bad)
    chosen = parse_range(settings.episodes, source.n_episodes)
    return convert(SubsetSource(source, chosen, settings.cameras or None), settings)


def convert(source: SubsetSource, settings: Settings, command: str | None = None) -> Converted:
    """Write all of `source`; the settings' episodes and cameras have been chosen already.

    `command` is what continues it when it is killed; None: `vla data convert` with these settings.
    """
    if settings.dry_run:
        size = estimate_bytes(source, settings)
        print(
            f"{source.n_episodes} episodes, {len(source)} frames, cameras {', '.join(source.cameras) or 'none'} -> "
            f"{settings.to} in {settings.out}, about {_human(size)}; free there: {_human(_free_bytes(settings.out))}"
        )
        return Converted(settings.out, 0, 0, 0, 0)
    if settings.to == "cache" and (settings.out / CACHE_JSON).is_file():
        done = _finished(source, settings)
    else:
        with locked(settings.out):
            if settings.to == "cache":
                done = _to_cache(source, settings)
            else:
                done = _to_lerobot(source, settings, command or command_of("data convert", settings))
    bad = f", {done.n_bad} bad episodes left out: {bad_path(settings.out)}" if done.n_bad else ""
    print(f"{done.n_new} new episodes, {done.n_episodes} in all, {done.n_frames} frames{bad}: {settings.out}")
    return done


def bad_path(out: Path) -> Path:
    """Where the bad episodes of a conversion are listed: {episode, error}, one line each; see also `unread_records`."""
    return out.with_name(out.name + ".bad.jsonl")


def estimate_bytes(source: FrameSource, settings: Settings) -> int:
    """Size of the result, from a few frames that are encoded; of video, only an order of magnitude."""
    total, cache = 0, settings.cache
    sample = sorted({int(i) for i in np.linspace(0, len(source) - 1, SAMPLE_FRAMES)})
    for camera in source.cameras:
        pixels = int(np.prod(cache.shape(source.image_shape(camera))))
        if settings.to == "cache" and cache.kind == "raw":
            mean = float(pixels)
        elif settings.images == "video":
            mean = pixels / 100  # AV1 at lerobot's settings: 0.2 to 0.3 bits a pixel
        elif settings.to == "cache":
            mean = float(np.mean([len(encode_frame(source, i, camera, cache)) for i in sample]))
        else:
            mean = float(
                np.mean([len(encode_png(_sized(source.images(i, [camera])[camera], settings))) for i in sample])
            )
        total += round(mean * len(source))
    return total + len(source) * 4 * (source.action_dim + source.state_dim + 2)


def _finished(source: SubsetSource, settings: Settings) -> Converted:
    """Nothing to write: the cache is complete."""
    reader = _finished_cache(source, settings)
    print(f"{settings.out} is complete")
    if settings.verify:
        verify_cache(reader, source, settings.cache)
    return Converted(settings.out, reader.n_episodes, len(reader), 0, len(read_jsonl(bad_path(settings.out))))


def _to_cache(source: SubsetSource, settings: Settings) -> Converted:
    if is_new(settings.out):
        bad_path(settings.out).unlink(missing_ok=True)
    writer = CacheWriter(settings.out, source, settings.cache)
    n_before = len(writer.rows)
    done = {row["source_episode"] for row in writer.rows}
    try:
        n_bad = _each_episode(source, settings, len(done), lambda k, tick: writer.add_episode(k, tick))
        writer.finish()
    finally:
        writer.close()
    reader = CacheReader(settings.out)
    if settings.verify:
        verify_cache(reader, source, settings.cache)
    return Converted(settings.out, reader.n_episodes, len(reader), reader.n_episodes - n_before, n_bad)


def _finished_cache(source: FrameSource, settings: Settings) -> CacheReader:
    reader = CacheReader(settings.out)
    expected = {"source_hash": source_hash(source), "settings": asdict(settings.cache)}
    for name, value in expected.items():
        if reader.info[name] != value:
            raise problem(
                f"{settings.out}, a cache with {name} {reader.info[name]}", f"{value}", "choose another --out"
            )
    return reader


def _to_lerobot(source: SubsetSource, settings: Settings, command: str) -> Converted:
    fps = settings.fps or source.fps
    if fps < 1 or fps != int(fps):
        raise problem(f"{fps:g} fps in {source.where}", "a whole number, as LeRobot requires", "pass --fps")
    knows_success = source.n_episodes > 0 and all(source.success_of(k) is not None for k in range(source.n_episodes))
    cameras = {camera: settings.cache.shape(source.image_shape(camera))[:2] for camera in source.cameras}
    _claim_lerobot(source, settings, command)
    writer = LeRobotWriter(
        settings.out, int(fps), cameras, source.state_names, source.action_names, source.name,
        "video" if settings.images == "video" else "image", resume=True, record_success=knows_success,
    )  # fmt: skip
    n_before = writer.n_episodes

    def add(k: int, tick: Callable[[], None]) -> None:
        check_numbers(source, k)
        writer.add_episode(_prepared(source.episode(k), settings))
        for _ in range(source.episodes[k].stop - source.episodes[k].start):
            tick()

    with writer:
        n_bad = _each_episode(source, settings, n_before, add)
        if not writer.n_episodes:
            raise problem(f"no episode of {source.where} to write", "at least one", "choose other episodes")
    if settings.verify:
        bad = {row["episode"] for row in read_jsonl(bad_path(settings.out))}
        written = [k for k, number in enumerate(source.chosen) if number not in bad]
        verify_lerobot(settings.out, source, written, lambda episode: _prepared(episode, settings), fps)
    end(settings.out)
    return Converted(settings.out, writer.n_episodes, writer.n_frames, writer.n_episodes - n_before, n_bad)


def _claim_lerobot(source: SubsetSource, settings: Settings, command: str) -> None:
    """Refuse a folder with anything but this conversion; mark a new one as unfinished."""
    path, out = settings.out / CONVERT_JSON, settings.out
    shaping = {"source_hash": source_hash(source), "cameras": list(source.cameras), "images": settings.images or "png",
               "size_px": settings.size_px, "resize_filter": settings.resize_filter, "fps": settings.fps,
               "instruction": settings.instruction}  # fmt: skip
    if path.is_file():
        found = read_object(path, "remove the folder and convert anew")
        for name, value in shaping.items():
            if found.get(name) != value:
                raise problem(f"{name} {value!r}", f"{found.get(name)!r}, as the conversion in {out} began",
                              "use the same source and settings, or another --out")  # fmt: skip
    elif not is_new(out):
        raise problem(f"{out} is not empty", "a new folder, or a conversion to continue", "choose another --out")
    else:
        bad_path(out).unlink(missing_ok=True)
        begin(out, command)
        write_json(path, shaping)


def _each_episode(
    source: SubsetSource, settings: Settings, n_written: int, add: Callable[[int, Callable[[], None]], None]
) -> int:
    """Add every episode but the bad ones and the first `n_written` others; returns the number of bad ones.

    The list of bad ones has the numbers of the dataset that was converted, not of the part of it that was chosen.
    """
    path = bad_path(settings.out)
    rows = read_jsonl(path)
    if rows:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # without a line cut by a crash
    for record in unread_records(source.source):
        if record not in rows:
            append_jsonl(path, record)
            rows.append(record)
    n_unread, bad = sum(row["episode"] is None for row in rows), {row["episode"] for row in rows}
    todo = [k for k, number in enumerate(source.chosen) if number not in bad][n_written:]
    n_todo = sum(source.episodes[k].stop - source.episodes[k].start for k in todo)
    with Progress("frames", len(source), len(source) - n_todo) as progress:
        for k in todo:
            before, n = progress.done, source.episodes[k].stop - source.episodes[k].start
            try:
                add(k, progress.advance)
            except VlaError as error:
                if not settings.skip_bad:
                    raise VlaError(
                        f"episode {source.chosen[k]}: {error} (--skip-bad leaves such episodes out)"
                    ) from error
                append_jsonl(path, {"episode": source.chosen[k], "error": str(error)})
                bad.add(source.chosen[k])
            progress.advance(n - (progress.done - before))
    return n_unread + len(bad - {None})


def unread_records(source: FrameSource) -> list[dict[str, Any]]:
    """Episodes left out when the dataset was opened, as rows for the list of bad episodes: they have no number."""
    return [{"episode": None, "file": bad.file, "record": bad.record, "error": bad.why} for bad in source.bad]


def _prepared(episode: Episode, settings: Settings) -> Episode:
    """With frames of the wanted size and an instruction."""
    instruction = episode.instruction if episode.instruction.strip() else settings.instruction or ""
    if not instruction:
        raise problem("an episode without an instruction", "one, as LeRobot requires", "pass --instruction, or skip it")
    steps = []
    for step in episode.steps:
        images = {camera: _sized(image, settings) for camera, image in step.observation.images.items()}
        steps.append(replace(step, observation=replace(step.observation, images=images)))
    return replace(episode, steps=steps, instruction=instruction)


def _sized(image: np.ndarray, settings: Settings) -> np.ndarray:
    if settings.size_px is None:
        return image
    return np.asarray(prepare_image(image, ImageSpec(("",), settings.size_px, settings.resize_filter)))


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _human(n_bytes: int) -> str:
    power = min(4, int(math.log(max(n_bytes, 1), 1024)))
    return f"{n_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
