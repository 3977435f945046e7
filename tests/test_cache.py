"""Our own cache: what comes out is what went in, whatever interrupts the writing, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sources import ArraySource, toy_source

from vla.finetune.formats.cache_format import DECODERS, CacheSettings, encode_jpeg, npy_header
from vla.finetune.formats.cache_reader import CacheReader
from vla.finetune.formats.cache_verify import verify_cache
from vla.finetune.formats.cache_writer import CacheWriter
from vla.finetune.formats.source import FrameSource
from vla.inputs import prepare_image
from vla.spec import ImageSpec
from vla.types import VlaError

RAW = CacheSettings()


def write(root: Path, source: FrameSource, settings: CacheSettings = RAW) -> CacheReader:
    writer = CacheWriter(root, source, settings)
    for k in range(len(writer.rows), source.n_episodes):
        writer.add_episode(k)
    writer.finish()
    return CacheReader(root)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def small_shards(monkeypatch, frames: int) -> None:
    monkeypatch.setattr(CacheSettings, "frames_per_shard", lambda self, shape: frames)


@pytest.mark.parametrize("per_shard", [1, 3, 7, 1000])
def test_raw_gives_back_every_number_and_pixel(tmp_path, monkeypatch, per_shard):
    small_shards(monkeypatch, per_shard)
    source = toy_source(success=[True, False, None, True])
    cache = pickle.loads(pickle.dumps(write(tmp_path / "c", source)))
    assert (len(cache), cache.fps, cache.name, cache.cameras) == (len(source), 10.0, "arrays", source.cameras)
    assert cache.episodes == source.episodes and cache.action_names == source.action_names
    np.testing.assert_array_equal(cache.actions(), source.actions())
    np.testing.assert_array_equal(cache.states(), source.states())
    assert cache.rewards() is None
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        for camera, image in cache.images(i).items():
            np.testing.assert_array_equal(image, source.images(i)[camera])
            assert image.flags.writeable and cache.image_shape(camera) == image.shape
        assert cache.instruction_of(i) == source.instruction_of(i)
    assert [cache.success_of(k) for k in range(4)] == [True, False, None, True]
    assert [cache.seed_of(k) for k in range(4)] == [100, 101, 102, 103]
    assert cache.damaged_files() == []
    verify_cache(cache, source, CacheSettings())
    for path in (tmp_path / "c").rglob("*.npy"):  # any program can open them
        assert len(np.load(path, allow_pickle=False)) > 0


def test_jpeg_keeps_the_bytes_a_source_has(tmp_path, monkeypatch):
    small_shards(monkeypatch, 4)
    source, settings = toy_source(2, cameras={"front": (16, 24)}), CacheSettings("jpeg", quality=90)
    own = encode_jpeg(source.images(3)["front"], 50)
    source.jpegs[3] = own
    cache = write(tmp_path / "c", source, settings)
    for i in range(len(source)):
        expected = own if i == 3 else encode_jpeg(source.images(i)["front"], 90)
        assert cache.jpeg(i, "front") == expected
        assert cache.images(i)["front"].shape == (16, 24, 3)
    verify_cache(cache, source, settings)
    source.jpegs[5] = own
    with pytest.raises(VlaError, match=r"got frame 5, camera front of .*c; expected frame 5 of memory/arrays"):
        verify_cache(cache, source, settings)


@pytest.mark.parametrize("decoder", ["pillow", "tensorflow"])
def test_kept_jpegs_are_read_as_the_source_reads_them(tmp_path, decoder):
    """The two decoders give other pixels; a source that uses neither has its frames encoded anew."""
    y, x = np.mgrid[:32, :48]
    files = [encode_jpeg(np.stack([x * 5, y * 7, (x * y) % 256], 2).astype(np.uint8), 60 + k) for k in range(15)]

    class JpegSource(ArraySource):
        def images(self, i, cameras=None):
            return {"front": DECODERS[decoder](files[i])}

        def jpeg(self, i, camera):
            return files[i]

    actions = [np.random.default_rng(k).normal(size=(7 + k, 7)) for k in range(2)]
    source, settings = JpegSource(actions, cameras={"front": (32, 48)}), CacheSettings("jpeg")
    assert (DECODERS["pillow"](files[0]) != DECODERS["tensorflow"](files[0])).any()
    cache = write(tmp_path / "c", source, settings)
    for i in range(len(source)):
        assert cache.jpeg(i, "front") == files[i]
        np.testing.assert_array_equal(cache.images(i)["front"], source.images(i)["front"])
    verify_cache(cache, source, settings)
    source.images = lambda i, cameras=None: {"front": 255 - DECODERS[decoder](files[i])}
    other = write(tmp_path / "d", source, settings)
    assert other.info["jpeg_decoder"] is None and other.jpeg(0, "front") != files[0]
    assert np.abs(other.images(0)["front"].astype(int) - source.images(0)["front"]).mean() < 5


def test_resized_as_the_policy_would(tmp_path):
    source, settings = toy_source(1), CacheSettings(size_px=10, resize_filter="bilinear")
    cache = write(tmp_path / "c", source, settings)
    assert cache.image_shape("wrist/left") == (10, 10, 3)
    expected = prepare_image(source.images(2)["front"], ImageSpec(("front",), 10, "bilinear"))
    np.testing.assert_array_equal(cache.images(2)["front"], np.asarray(expected))


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_stopped_anywhere_and_continued_it_is_the_same(tmp_path, monkeypatch, kind):
    """The writer dies at every single frame in turn; what a second one makes of the folder equals an undisturbed one."""
    small_shards(monkeypatch, 5)
    source, settings = toy_source(3, 4), CacheSettings(kind)
    write(tmp_path / "whole", source, settings)
    expected = contents(tmp_path / "whole")

    class Died(Exception):
        pass

    for stop in range(1, len(source) + 1, 2):
        root, seen = tmp_path / f"{stop}", 0

        def tick(stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise Died

        writer = CacheWriter(root, source, settings)
        with pytest.raises(Died):
            for k in range(source.n_episodes):
                writer.add_episode(k, tick)
        for shards in writer._shards.values():
            shards.flush()
        with open(root / "episodes.jsonl", "a") as file:
            file.write('{"start": 1')  # a row cut by the crash
        with pytest.raises(VlaError, match="unfinished cache in .*same `vla data convert` command"):
            CacheReader(root)
        write(root, source, settings)
        assert contents(root) == expected


WRITE_SLOWLY = """
import sys, time
sys.path.insert(0, {tests!r})
from sources import ArraySource, toy_source
from vla.finetune.formats.cache_format import CacheSettings
from vla.finetune.formats.cache_verify import verify_cache
from vla.finetune.formats.cache_writer import CacheWriter
source = toy_source(6, 5)
writer = CacheWriter(sys.argv[1], source, CacheSettings())
for k in range(6):
    writer.add_episode(k, lambda: time.sleep(0.02))
"""


def test_kill_9_in_the_middle(tmp_path):
    source = toy_source(6, 5)
    code = WRITE_SLOWLY.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    rows = tmp_path / "killed/episodes.jsonl"
    deadline = time.monotonic() + 30
    while not (rows.exists() and len(rows.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(rows.read_text().splitlines()) < 6
    before = rows.read_text().splitlines()[:2]
    cache = write(tmp_path / "killed", source)
    assert rows.read_text().splitlines()[:2] == before  # not written twice
    write(tmp_path / "whole", source)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    verify_cache(cache, source, CacheSettings())


def test_a_folder_is_never_overwritten_or_mixed(tmp_path):
    source = toy_source(2)
    CacheWriter(tmp_path / "c", source, CacheSettings()).add_episode(0)
    for other, settings in ((toy_source(3), CacheSettings()), (source, CacheSettings(size_px=8))):
        with pytest.raises(VlaError, match="as the cache in .*c was begun"):
            CacheWriter(tmp_path / "c", other, settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("precious")
    with pytest.raises(VlaError, match="mine is not empty"):
        CacheWriter(tmp_path / "mine", source, CacheSettings())
    write(tmp_path / "c", source)
    with pytest.raises(VlaError, match="c is not empty"):
        CacheWriter(tmp_path / "c", source, CacheSettings())


def test_truncated_changed_and_missing_files_are_named(tmp_path, monkeypatch):
    small_shards(monkeypatch, 5)
    source = toy_source()
    write(tmp_path / "c", source)
    shard = tmp_path / "c/images/00_front/shard-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        VlaError, match=rf"00_front/shard-00001.npy of {len(whole) - 1} bytes; expected {len(whole)} bytes"
    ):
        CacheReader(tmp_path / "c")
    shard.unlink()
    with pytest.raises(VlaError, match="shard-00001.npy missing"):
        CacheReader(tmp_path / "c")
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cache = CacheReader(tmp_path / "c")
    assert cache.damaged_files() == [shard]
    with pytest.raises(VlaError, match="shard-00001.npy with another checksum"):
        verify_cache(cache, source, CacheSettings())
    info = json.loads((tmp_path / "c/cache.json").read_text())
    (tmp_path / "c/cache.json").write_text(json.dumps(info | {"version": 99}))
    with pytest.raises(VlaError, match="format and version"):
        CacheReader(tmp_path / "c")
    with pytest.raises(VlaError, match="no .*cache.json; .*vla data convert"):
        CacheReader(tmp_path)


def test_a_bad_episode_leaves_nothing(tmp_path, monkeypatch):
    small_shards(monkeypatch, 5)
    source = toy_source()
    source.broken.add(source.episodes[1].start + 5)
    source._actions[source.episodes[2].start + 1, 2] = np.nan
    writer = CacheWriter(tmp_path / "c", source, CacheSettings())
    writer.add_episode(0)
    with pytest.raises(VlaError, match="broken frame"):
        writer.add_episode(1)
    with pytest.raises(VlaError, match="action nan at frame 1 of episode 2, dimension 2, in memory/arrays"):
        writer.add_episode(2)
    writer.add_episode(3)
    writer.finish()
    cache = CacheReader(tmp_path / "c")
    assert [row["source_episode"] for row in cache.rows] == [0, 3] and len(cache) == 7 + 10
    verify_cache(cache, source, CacheSettings())


def test_settings_and_frames_out_of_range(tmp_path):
    for bad, message in (({"quality": 0}, "quality 0"), ({"kind": "png"}, "kind 'png'"), ({"size_px": 0}, "size_px 0"),
                         ({"resize_filter": "x"}, "resize_filter 'x'")):  # fmt: skip
        with pytest.raises(VlaError, match=message):
            CacheSettings(**bad)
    cache = write(tmp_path / "c", toy_source(1))
    with pytest.raises(VlaError, match="frame 7; expected 0..6"):
        cache.images(7)
    with pytest.raises(VlaError, match="camera 'top'; expected one of front, wrist/left"):
        cache.images(0, ["top"])
    assert len(npy_header("|u1", (10**9, 1080, 1920, 3))) == 128
    CacheWriter(tmp_path / "none", toy_source(1), CacheSettings())
    with pytest.raises(VlaError, match="no episode"):
        CacheWriter(tmp_path / "none", toy_source(1), CacheSettings()).finish()
