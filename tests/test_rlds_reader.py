"""RLDS read without TensorFlow, against what tensorflow_datasets itself reads.

Files: see test_tfrecord.py. tests/golden/rlds.npz holds, for each episode in the order of the shards, what
`builder_from_directory(...).as_dataset(split)` gave (tensorflow_datasets 4.9.10, TensorFlow 2.21): every number and text
(text as hex of its bytes), and of each image its shape and the SHA-256 of its encoded bytes and of its decoded pixels;
the pixels themselves for one JPEG camera of episode 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tfrecord import example, field, framed

from vla.finetune.data.standard import Standard
from vla.finetune.formats import rlds_cache
from vla.finetune.formats.rlds_reader import RldsReader, decode_image
from vla.finetune.formats.tfds_features import read_features
from vla.finetune.formats.tfrecord import read_records
from vla.finetune.oxe.registry import oxe_standardizer
from vla.jpeg import decode_jpeg
from vla.types import VlaError

TESTS = Path(__file__).parent
RLDS = TESTS / "fixtures" / "rlds"
TINY, NESTED = RLDS / "tiny_arm" / "1.0.0", RLDS / "nested_arm" / "0.1.0"
GOLD = dict(np.load(TESTS / "golden" / "rlds.npz"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlds"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny_arm" / "1.0.0"))


class NestedRule:
    """A standardizer of the nested fixture: drops the first step, puts the action together."""

    def __init__(self, scale: float = 1.0) -> None:
        self.cameras: Mapping[str, str] = {"gray": "observation/gray", "primary": "observation/rgb"}
        self.action_names: tuple[str, ...] = ("x", "y", "z", "gripper")
        self.state_names: tuple[str, ...] = ()
        self.scale = scale

    @property
    def keys(self) -> tuple[str, ...]:
        return "action/world_vector", "action/gripper_closedness_action", "observation/natural_language_instruction"

    def __call__(self, columns: Mapping[str, np.ndarray]) -> Standard:
        vector, gripper, text = (columns[key] for key in self.keys)
        actions = np.concatenate([vector * self.scale, gripper], axis=1)[1:]
        return Standard(actions.astype(np.float32), None, tuple(text[1:]), np.arange(1, len(vector)))


def sha(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def gold_columns(tag: str) -> dict[str, np.ndarray]:
    return {key[len(tag) + 1 :]: value for key, value in GOLD.items() if key.startswith(tag + "/")}


@pytest.mark.parametrize(("root", "split"), [(TINY, "train"), (TINY, "val"), (NESTED, "train")])
def test_every_number_and_text_equals_tfds(root: Path, split: str) -> None:
    reader = RldsReader(root, split, NestedRule() if root == NESTED else None)
    episodes = len({key.split("/")[2] for key in GOLD if key.startswith(f"{root.parent.name}/{split}/")})
    assert reader.n_episodes == (episodes if root == TINY else 4)  # the rule leaves nothing of an episode of one step
    checked, offset = 0, 0
    for e in range(episodes):
        gold = gold_columns(f"{root.parent.name}/{split}/{e}")
        if root == NESTED and gold["n"] == 1:
            offset = 1
            continue
        for key, values in reader.raw_episode(e - offset).items():
            assert len(values) == gold["n"], key
            for t, value in enumerate(values):
                want = gold[f"{key}/{t}"] if f"{key}/{t}" in gold else gold[key]
                if f"{key}/{t}" not in gold and reader.leaves[key].in_steps:
                    want = want[t]
                assert_same(value, want, key)
                checked += 1
    assert checked > 100


def assert_same(value: Any, want: np.ndarray, key: str) -> None:
    if isinstance(value, str | bytes):
        assert (value.encode() if isinstance(value, str) else value) == bytes.fromhex(str(want)), key
    elif isinstance(value, np.ndarray) and value.dtype == object:
        assert [text.encode() for text in value] == [bytes.fromhex(text) for text in want], key
    else:
        assert np.asarray(value).dtype == want.dtype, key
        np.testing.assert_array_equal(value, want, err_msg=key)


@pytest.mark.parametrize("split", ["train", "val"])
def test_plain_columns_and_images_equal_tfds(split: str) -> None:
    reader, frame = RldsReader(TINY, split), 0
    for e, span in enumerate(reader.episodes):
        gold = gold_columns(f"tiny_arm/{split}/{e}")
        assert len(span) == gold["n"]
        mine = slice(span.start, span.stop)
        np.testing.assert_array_equal(reader.actions()[mine], gold["action"])
        np.testing.assert_array_equal(reader.states()[mine], gold["observation/state"])
        np.testing.assert_array_equal(reader.rewards()[mine], gold["reward"])
        for t in range(len(span)):
            assert reader.instruction_of(frame).encode().hex() == gold["language_instruction"][t]
            for camera, image in reader.images(frame).items():
                key = f"observation/{camera}"
                np.testing.assert_array_equal(sha(reader.encoded(frame, camera)), gold[f"{key}/bytes_sha256"][t])
                assert image.shape == tuple(gold[f"{key}/shapes"][t]) == reader.image_shape(camera)
                np.testing.assert_array_equal(sha(image.tobytes()), gold[f"{key}/pixels_sha256"][t])  # bit for bit
                if f"{key}/pixels" in gold:
                    np.testing.assert_array_equal(image, gold[f"{key}/pixels"][t])
            frame += 1
    assert frame == len(reader)


def test_standardizer_decides_steps_and_cameras() -> None:
    reader = RldsReader(NESTED, standardizer=NestedRule(2.0), name="mine")
    assert (reader.name, reader.cameras, reader.action_dim, reader.states()) == ("mine", ("gray", "primary"), 4, None)
    assert [bad.why for bad in reader.bad] == ["no steps"]
    frame = 0
    for e in range(5):
        gold = gold_columns(f"nested_arm/train/{e}")
        for t in range(1, gold["n"]):
            np.testing.assert_array_equal(reader.actions()[frame, :3], gold["action/world_vector"][t] * 2)
            images = reader.images(frame)
            np.testing.assert_array_equal(sha(images["primary"].tobytes()), gold["observation/rgb/pixels_sha256"][t])
            grey = images["gray"]
            assert (grey == grey[..., :1]).all()
            np.testing.assert_array_equal(sha(grey[..., :1].tobytes()), gold["observation/gray/pixels_sha256"][t])
            assert reader.instruction_of(frame).encode().hex() == gold["observation/natural_language_instruction"][t]
            frame += 1
    assert frame == len(reader)
    assert reader.image_shape("primary") == reader.images(0)["primary"].shape  # features.json leaves it open


def test_an_oxe_standardizer_fits() -> None:
    """One that reads `action` and a text; one that reads what this dataset does not have."""
    rule = oxe_standardizer("austin_buds", proprio=False)
    reader = RldsReader(TINY, standardizer=rule)
    assert reader.action_names == rule.action_names
    assert reader.actions().shape[1] == 7 and reader.cameras == ("primary",)
    with pytest.raises(VlaError, match="no feature 'action/open_gripper' in .*features.json; expected one of action, "):
        RldsReader(TINY, standardizer=oxe_standardizer("bridge_oxe"))


def test_random_access_is_sequential_access() -> None:
    reader = RldsReader(TINY)
    straight = [step for episode in reader.iter_episodes() for step in episode.steps]
    for i in np.random.default_rng(0).permutation(len(reader)):
        np.testing.assert_array_equal(straight[i].action, reader.actions()[i])
        for camera, image in reader.images(int(i)).items():
            np.testing.assert_array_equal(straight[i].observation.images[camera], image)
        assert straight[i].observation.instruction == reader.instruction_of(int(i))


def test_splits_add_up() -> None:
    whole, parts = RldsReader(TINY, "train+val"), [RldsReader(TINY, s) for s in ("train[:50%]", "train[50%:]", "val")]
    np.testing.assert_array_equal(whole.actions(), np.concatenate([part.actions() for part in parts]))
    last = parts[1].raw_episode(0, ["episode_metadata/episode_id"])["episode_metadata/episode_id"]
    np.testing.assert_array_equal(last, whole.raw_episode(4)["episode_metadata/episode_id"])


def test_pickled_copy_reads_the_same_in_its_own_files() -> None:
    reader = RldsReader(NESTED, "train[1:]", NestedRule())
    reader.images(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert len(pickle.dumps(reader)) < 1000  # arguments, not data
    np.testing.assert_array_equal(copy.actions(), reader.actions())
    np.testing.assert_array_equal(copy.images(2)["primary"], reader.images(2)["primary"])


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    builds, build = [], rlds_cache.build

    def counted(plan: Any) -> Any:
        builds.append(1)
        return build(plan)

    monkeypatch.setattr(rlds_cache, "build", counted)
    return builds


def test_index_is_kept_and_never_trusted(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    want = RldsReader(tiny).actions()
    assert sorted(path.name for path in tiny.iterdir()) == sorted(path.name for path in TINY.iterdir())
    np.testing.assert_array_equal(RldsReader(tiny).actions(), want)
    assert len(builds) == 1
    (index,) = cache.iterdir()
    content = index.read_bytes()
    for damaged in (
        content[:-1],
        content[:100] + b"\0" + content[101:],
        b"",
        b"\0" * 32 + content[32:],
        content[:64] + b"PK",
    ):
        index.write_bytes(damaged)
        n = len(builds)
        np.testing.assert_array_equal(RldsReader(tiny).actions(), want)
        assert len(builds) == n + 1
        assert index.read_bytes() == content
    os.utime(tiny / "features.json", (1, 1))  # as if somebody had written it
    RldsReader(tiny)
    assert len(builds) == n + 2
    RldsReader(tiny, "val")
    RldsReader(tiny, skip_bad=True)
    assert len(builds) == n + 4
    assert len(list(cache.iterdir())) == 3


def test_a_rule_whose_code_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    first = RldsReader(NESTED, standardizer=NestedRule()).actions()
    call = NestedRule.__call__

    def changed(self: NestedRule, columns: Mapping[str, np.ndarray]) -> Standard:
        standard = call(self, columns)
        return Standard(standard.actions + 1, None, standard.instructions, standard.frames)

    monkeypatch.setattr(NestedRule, "__call__", changed)
    np.testing.assert_array_equal(RldsReader(NESTED, standardizer=NestedRule()).actions(), first + 1)
    assert len(builds) == 2
    with pytest.raises(VlaError, match="a standardizer that cannot be pickled"):
        rule = NestedRule()
        rule.scale = lambda: 1  # type: ignore[assignment]
        RldsReader(NESTED, standardizer=rule)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(VlaError, match="Not a directory; .*fix: set VLA_CACHE"):
        RldsReader(TINY)


def shard(root: Path, number: int) -> Path:
    return root / f"tiny_arm-train.tfrecord-{number:05d}-of-00003"


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_bad_crc_of_data(tiny: Path) -> None:
    flip(shard(tiny, 1), list(read_records(shard(tiny, 1)))[1].offset + 50)
    with pytest.raises(
        VlaError, match=r"00001-of-00003: record 1 at byte \d+: the CRC of its data .*fix: .*--skip-bad"
    ):
        RldsReader(tiny)
    reader = RldsReader(tiny, skip_bad=True)
    assert reader.n_episodes == 6
    assert [(Path(bad.file).name[-14:], bad.record) for bad in reader.bad] == [("00001-of-00003", 1)]
    assert [int(reader.raw_episode(e)["episode_metadata/episode_id"][0]) for e in range(6)] == [6, 5, 4, 3, 1, 2]


def test_bad_crc_of_length_loses_the_rest_of_the_shard(tiny: Path) -> None:
    flip(shard(tiny, 1), list(read_records(shard(tiny, 1)))[1].offset - 12)
    with pytest.raises(VlaError, match="record 1 at byte .*: the CRC of its length"):
        RldsReader(tiny)
    reader = RldsReader(tiny, skip_bad=True)
    assert reader.n_episodes == 5
    assert len(reader.bad) == 2 and "only 2 of 3 readable records" in reader.bad[1].why


def test_truncated_and_short_and_long_shards(tiny: Path) -> None:
    path, content = shard(tiny, 2), shard(tiny, 2).read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(VlaError, match="00002-of-00003: record 1 at byte .* is cut off, the file ends at byte"):
        RldsReader(tiny)
    assert RldsReader(tiny, skip_bad=True).n_episodes == 6
    second = list(read_records(TINY / path.name))[1]
    path.write_bytes(content[: second.offset - 12])  # cut between two records
    with pytest.raises(VlaError, match="only 1 of 2 readable records; expected 2, as dataset_info.json says"):
        RldsReader(tiny)
    path.write_bytes(content + content)
    with pytest.raises(VlaError, match="with more than 2 records"):
        RldsReader(tiny)
    assert RldsReader(tiny, skip_bad=True).n_episodes == 7
    assert RldsReader(tiny, "train[:6]").n_episodes == 6  # the end is not looked at


def test_missing_shard(tiny: Path) -> None:
    shard(tiny, 0).unlink()
    with pytest.raises(VlaError, match="1 of 3 shards missing, the first .*00000-of-00003; expected all"):
        RldsReader(tiny)
    reader = RldsReader(tiny, skip_bad=True)
    assert reader.n_episodes == 5 and "No such file" in reader.bad[0].why
    assert [bad.record for bad in reader.bad] == [0, 1]
    for number in (1, 2):
        shard(tiny, number).unlink()
    with pytest.raises(VlaError, match="without one usable episode .*No such file"):
        RldsReader(tiny, skip_bad=True)


def test_features_missing_or_odd(tiny: Path) -> None:
    path, content = tiny / "features.json", json.loads((tiny / "features.json").read_text())
    for text, message in (
        ("[]", "holds no object"),
        ("{}", "features.json that cannot be understood"),
        ("{", "expected JSON"),
        ('{"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": {"a": 3}}}', "cannot be understood"),
        (
            '{"pythonClassName": "x.FeaturesDict", "featuresDict": {}}',
            "with the features none; expected an RLDS dataset",
        ),
    ):
        path.write_text(text)
        with pytest.raises(VlaError, match=message):
            RldsReader(tiny)
    path.unlink()
    with pytest.raises(VlaError, match="features.json: No such file"):
        RldsReader(tiny)
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        VlaError, match=r"record 0: 'action' with 28 values; expected a multiple of 6, its shape being \(6,\)"
    ):
        RldsReader(tiny)
    steps["action"]["tensor"]["shape"]["dimensions"] = ["14"]
    path.write_text(json.dumps(content))
    with pytest.raises(VlaError, match=r"record 0: 'action' with 2 values of shape \(14,\); expected 4, one per step"):
        RldsReader(tiny)
    steps["action"] = steps["is_first"]
    path.write_text(json.dumps(content))
    with pytest.raises(VlaError, match=r"with the actions action \(bool\); expected one vector 'action'"):
        RldsReader(tiny)


def test_unsupported_features_matter_only_when_wanted(tiny: Path) -> None:
    path, content = tiny / "features.json", json.loads((tiny / "features.json").read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["observation"]["featuresDict"]["features"]["sound"] = {
        "pythonClassName": "a.b.Audio",
        "audio": {"dtype": "int64"},
    }
    path.write_text(json.dumps(content))
    reader = RldsReader(tiny)
    assert reader.unsupported == {"observation/sound": "Audio"}
    assert "observation/sound" not in reader.raw_episode(0)
    with pytest.raises(VlaError, match="feature 'observation/sound' of type Audio; expected numbers or text"):
        reader.raw_episode(0, ["observation/sound"])
    with pytest.raises(VlaError, match="no feature 'observation/sounds' in .*features.json; expected one of action,"):
        reader.raw_episode(0, ["observation/sounds"])
    steps["language_instruction"] = steps["observation"]["featuresDict"]["features"]["sound"]
    path.write_text(json.dumps(content))
    rule = oxe_standardizer("austin_buds", proprio=False)
    with pytest.raises(VlaError, match="'language_instruction' of type Audio in .*; expected numbers or text"):
        RldsReader(tiny, standardizer=rule)
    rule = NestedRule()
    rule.cameras = {"depth": "observation/rgb"}
    with pytest.raises(VlaError, match="no feature 'action/world_vector'"):
        RldsReader(TINY, standardizer=rule)


def test_older_features_json(tmp_path: Path) -> None:
    """The form before TFDS 4.5: type and content."""
    core = "tensorflow_datasets.core.features"
    tensor = {
        "type": f"{core}.tensor_feature.Tensor",
        "content": {"shape": [7], "dtype": "float32", "encoding": "none"},
    }
    image = {
        "type": f"{core}.image_feature.Image",
        "content": {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "png"},
    }
    text = {"type": f"{core}.text_feature.Text", "content": {}}
    observation = {"type": f"{core}.features_dict.FeaturesDict", "content": {"image": image}}
    inner = {
        "type": f"{core}.features_dict.FeaturesDict",
        "content": {"action": tensor, "observation": observation, "text": text},
    }
    steps = {"type": f"{core}.dataset_feature.Dataset", "content": {"feature": inner, "length": None}}
    whole = {"type": f"{core}.features_dict.FeaturesDict", "content": {"steps": steps, "id": text}}
    (tmp_path / "features.json").write_text(json.dumps(whole))
    leaves = read_features(tmp_path)
    assert {key: (leaf.kind, leaf.shape, leaf.in_steps) for key, leaf in leaves.items()} == {
        "action": ("number", (7,), True),
        "observation/image": ("image", (None, None, 3), True),
        "text": ("text", (), True),
        "id": ("text", (), False),
    }


def rewrite(path: Path, record: int, change: Any) -> None:
    """`change(data)` in place of a record's data, with valid CRCs."""
    records = [bytearray(r.data) for r in read_records(path)]
    change(records[record])
    path.write_bytes(b"".join(framed(bytes(data)) for data in records))


def test_nan_action_names_step_and_dimension(tiny: Path) -> None:
    clean = RldsReader(tiny)
    third = clean.actions()[clean.episodes[2].start + 1]

    def spoil(data: bytearray) -> None:
        at = data.find(third.tobytes()) + 4 * 4
        data[at : at + 4] = np.float32(np.nan).tobytes()

    rewrite(shard(tiny, 1), 0, spoil)
    with pytest.raises(
        VlaError, match=r"00001-of-00003: record 0: nan in actions, step 1, dimension 4 \(4\); expected finite"
    ):
        RldsReader(tiny)
    reader = RldsReader(tiny, skip_bad=True)
    assert reader.n_episodes == 6 and reader.bad[0].record == 0
    assert pickle.loads(pickle.dumps(reader)).bad == reader.bad


def test_corrupt_image_names_its_place(tiny: Path) -> None:
    data = RldsReader(tiny).encoded(3, "image")
    rewrite(
        shard(tiny, 0),
        0,
        lambda record: record.__setitem__(slice(record.find(data), record.find(data) + 200), bytes(200)),
    )
    reader = RldsReader(tiny)  # pixels are not looked at
    reader.images(3, ["wrist_image"])
    with pytest.raises(
        VlaError, match=r"00000-of-00003: record 0, step 3, camera 'image': \d+ bytes that are no image"
    ):
        reader.images(3)
    shard(tiny, 0).write_bytes(shard(tiny, 0).read_bytes()[:100])
    with pytest.raises(VlaError, match="step 2, camera 'image': 0 of .* bytes; expected the file as it was indexed"):
        reader.images(2)


def test_image_of_another_size_and_as_many_images_as_steps(tiny: Path) -> None:
    path = tiny / "features.json"
    content = json.loads(path.read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["observation"]["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = ["32", "33", "3"]
    path.write_text(json.dumps(content))
    with pytest.raises(VlaError, match="an image of 32 x 32 px; expected 32 x 33, as features.json says"):
        RldsReader(tiny).images(0)
    shutil.copyfile(TINY / "features.json", path)
    rewrite(
        shard(tiny, 0),
        0,
        lambda record: record.__setitem__(slice(None), record.replace(b"observation/image", b"observation/imagf")),
    )
    with pytest.raises(VlaError, match="record 0: none images of 'observation/image'; expected 4, one per step"):
        RldsReader(tiny)


def test_a_record_without_an_action(tiny: Path) -> None:
    record = example(**{"steps/language_instruction": field(1, 2, field(1, 2, b"go"))})
    rewrite(shard(tiny, 0), 0, lambda data: data.__setitem__(slice(None), record))
    with pytest.raises(VlaError, match="record 0: no feature 'steps/action'; expected it, as features.json says"):
        RldsReader(tiny)


def test_frames_cameras_and_episodes_that_are_not_there() -> None:
    reader = RldsReader(TINY)
    for call in (lambda: reader.images(99), lambda: reader.instruction_of(-1)):
        with pytest.raises(VlaError, match=r"frame (99|-1); expected 0\.\.22"):
            call()
    with pytest.raises(VlaError, match="camera 'front'; expected one of image, wrist_image"):
        reader.images(0, ["front"])
    with pytest.raises(VlaError, match=r"episode 7; expected 0\.\.6"):
        reader.raw_episode(7)
    assert reader.jpeg(0, "image") == reader.encoded(0, "image") and reader.jpeg(0, "wrist_image") is None


@pytest.mark.parametrize(
    "name", sorted({key.rsplit("_", 1)[0] for key in np.load(TESTS / "golden" / "jpeg_decode.npz")})
)
def test_jpeg_is_decoded_as_tensorflow_does(name: str) -> None:
    """jpeg_decode.npz: files by Pillow (quality 90; 17x19 progressive) or `tf.io.encode_jpeg` (grey), pixels by
    `tf.io.decode_image(file, channels=3)`. Pillow's own pixels differ from these by up to 15 grey levels."""
    gold = np.load(TESTS / "golden" / "jpeg_decode.npz")
    data = gold[f"{name}_file"].tobytes()
    np.testing.assert_array_equal(decode_jpeg(data), gold[f"{name}_pixels"])
    np.testing.assert_array_equal(decode_image(data), gold[f"{name}_pixels"])
    with pytest.raises(ValueError):
        decode_jpeg(data[: len(data) // 2])
