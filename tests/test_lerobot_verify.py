"""`--verify`: everything of the result is compared with the source."""

from __future__ import annotations

import json

import numpy as np
import pytest
from episodes import smooth_episode
from sources import toy_source
from test_cache import write

from vla.finetune.data.data_convert import Settings, convert
from vla.finetune.data.subset_source import SubsetSource
from vla.finetune.formats.cache_format import DECODERS, CacheSettings, encode_jpeg
from vla.finetune.formats.cache_verify import verify_cache
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_verify import VIDEO_GREY_LEVELS
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.types import VlaError


def source_of(**options):
    return toy_source(3, cameras={"front": (16, 20)}, success=[True, False, True], **options)


def changed(kind: str):
    """The source, with one thing in it changed after it was written."""
    source = source_of()
    if kind == "frame":
        source.frame_seeds[8] = 999
    elif kind == "success":
        source.success = [True, False, False]
    elif kind == "seed":
        source.seeds = [100, 101, 7]
    elif kind == "task":
        source.task_of = lambda episode: "another"  # type: ignore[method-assign]
    elif kind == "instruction":
        source.instructions[1] = "wave"
    elif kind == "actions":
        source._actions[9, 1] += 0.5
    elif kind == "states":
        source._states[9, 1] += 0.5
    return source


KINDS = {"frame": r"frame 1 of episode 1, camera front: .*grey levels", "success": "success True of episode 2",
         "seed": "seed 102 of episode 2; |seed 102 of episode 2", "task": "task None of episode 0", "instruction": "instruction",
         "actions": "actions of episode 1", "states": "states of episode 1"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lerobot_is_compared_with_its_source(tmp_path, monkeypatch, kind, capsys):
    settings = Settings("x", "lerobot", tmp_path / "out", verify=True)
    convert(SubsetSource(source_of()), settings)
    assert "verified: 24 frames, 3 episodes, as in memory/arrays" in capsys.readouterr().out
    # The hash of what was begun would find the changed numbers first.
    monkeypatch.setattr("vla.finetune.data.data_convert.source_hash", lambda source: "same")
    found = json.loads((tmp_path / "out/convert.json").read_text())
    (tmp_path / "out/convert.json").write_text(json.dumps(found | {"source_hash": "same"}))
    with pytest.raises(VlaError, match=KINDS[kind]):
        convert(SubsetSource(changed(kind)), settings)


def test_bad_episodes_and_sizes_are_allowed_for(tmp_path):
    source = source_of(instructions=["", "wave", ""])
    source.broken.add(8)
    done = convert(SubsetSource(source), Settings("x", "lerobot", tmp_path / "out", size_px=24, instruction="push",
                                                  skip_bad=True, verify=True))  # fmt: skip
    assert (done.n_episodes, done.n_bad) == (2, 1)


def test_video_to_its_tolerance(tmp_path, monkeypatch):
    with LeRobotWriter(
        tmp_path / "a", 10, {"front": (64, 64)}, ("x", "y", "z"), ("dx", "dy", "gripper"), "toy"
    ) as writer:
        for k in range(2):
            writer.add_episode(smooth_episode(k))
    settings = Settings("x", "lerobot", tmp_path / "out", "video", verify=True)
    source = LeRobotReader(tmp_path / "a")
    convert(SubsetSource(source), settings)
    images = LeRobotReader.images

    def other(self, i, cameras=None):
        found = images(self, i, cameras)
        return found if self.root != source.root or i != 7 else {c: image + 20 for c, image in found.items()}

    monkeypatch.setattr(LeRobotReader, "images", other)
    with pytest.raises(
        VlaError, match=rf"frame 1 of episode 1, camera front: .* grey levels .*at most {VIDEO_GREY_LEVELS:g}"
    ):
        convert(SubsetSource(source), settings)


@pytest.mark.parametrize("kind", ["instruction", "success", "seed", "task", "actions"])
def test_a_cache_is_compared_with_all_of_its_source(tmp_path, kind):
    settings = CacheSettings()
    cache = write(tmp_path / "c", source_of(), settings)
    verify_cache(cache, source_of(), settings)
    with pytest.raises(VlaError, match=kind):
        verify_cache(cache, changed(kind), settings)


def test_a_cache_is_encoded_as_its_writer_did(tmp_path, monkeypatch):
    """A source whose JPEG files are read in neither of the two ways: the writer kept none of them."""
    source = source_of()
    source.jpegs = {i: encode_jpeg(source.images(i)["front"], 95) for i in range(len(source))}
    assert not any(np.array_equal(decode(source.jpegs[0]), source.images(0)["front"]) for decode in DECODERS.values())
    settings = CacheSettings("jpeg", 90)
    cache = write(tmp_path / "c", source, settings)
    assert cache.info["jpeg_decoder"] is None
    verify_cache(cache, source, settings)
