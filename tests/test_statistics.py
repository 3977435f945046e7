from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from episodes import WRITER, make_episode
from sources import arm_source, toy_source

from vla.finetune.data import quantiles as quantiles_module
from vla.finetune.data.quantiles import RowStore, order_statistics, quantiles, row_blocks
from vla.finetune.data.statistics import (
    FILE,
    action_mask,
    constant_dimensions,
    constant_warnings,
    data_hash,
    dataset_statistics,
    read_statistics,
    statistics_hash,
    stream_statistics,
    vector_statistics,
    write_statistics,
)
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.lerobot_writer import LeRobotWriter
from vla.normalize import action_normalizer
from vla.types import VlaError

GOLDEN = Path(__file__).parent / "fixtures/lerobot_v3_image"


def test_exact_quantiles_of_all_rows_never_the_stored_ones():
    reader = LeRobotReader(GOLDEN)
    entry = dataset_statistics(reader)
    actions = reader.actions().astype(np.float64)
    for name, value in (("q01", np.quantile(actions, 0.01, axis=0)), ("q99", np.quantile(actions, 0.99, axis=0)),
                        ("mean", actions.mean(0)), ("std", actions.std(0)), ("min", actions.min(0)),
                        ("max", actions.max(0))):  # fmt: skip
        np.testing.assert_array_equal(entry["action"][name], value)
    stored = json.loads((GOLDEN / "meta/stats.json").read_text())["action"]["q01"]
    assert np.abs(np.array(stored) - entry["action"]["q01"]).max() > 0.05
    assert entry["action"]["mask"] == [True] * 6 + [False]
    assert list(entry) == ["action", "proprio", "num_transitions", "num_trajectories"]
    assert (entry["num_transitions"], entry["num_trajectories"]) == (39, 3)
    assert set(entry["proprio"]) == {"mean", "std", "max", "min", "q01", "q99"} and len(entry["proprio"]["mean"]) == 8


def test_some_episodes_only():
    reader = LeRobotReader(GOLDEN)
    entry = dataset_statistics(reader, episodes=[0, 2])
    rows = np.concatenate([reader.actions()[:12], reader.actions()[25:]])
    np.testing.assert_array_equal(entry["action"]["max"], rows.max(0).astype(np.float64))
    assert (entry["num_transitions"], entry["num_trajectories"]) == (26, 2)
    with pytest.raises(VlaError, match="without rows"):
        dataset_statistics(reader, episodes=[])


def test_mask():
    names = ("dx", "gripper", "dz")
    assert action_mask(names) == [True, False, True]
    assert action_mask(("dx", "dy")) == [True, True]
    assert action_mask(names, None) == [True, True, True]
    assert action_mask(names, 2) == [True, True, False]
    with pytest.raises(VlaError, match=r"gripper_dim 3; expected 0\.\.2"):
        action_mask(names, 3)


def test_round_trip_feeds_the_normaliser(tmp_path):
    value = {"toy": dataset_statistics(LeRobotReader(GOLDEN))}
    write_statistics(tmp_path / FILE, value)
    assert read_statistics(tmp_path) == read_statistics(tmp_path / FILE) == value
    normalizer = action_normalizer(read_statistics(tmp_path), None, 7)
    actions = LeRobotReader(GOLDEN).actions()
    inside = ((actions >= normalizer.q01) & (actions <= normalizer.q99)) | ~normalizer.mask
    back = normalizer.unnormalize(normalizer.normalize(actions))
    np.testing.assert_allclose(back[inside], actions[inside], atol=1e-6)


def test_nan_is_named(tmp_path):
    with pytest.raises(VlaError, match=r"action of d: nan at frame 1, dimension 0; expected finite"):
        vector_statistics(np.array([[0.0], [np.nan]]), "action of d")


def test_statistics_of_a_dataset_without_state(tmp_path):
    with LeRobotWriter(tmp_path / "a", **dict(WRITER, state_names=())) as writer:
        writer.add_episode(dataclasses.replace(make_episode(0)))
    assert "proprio" not in dataset_statistics(LeRobotReader(tmp_path / "a"))


GOOD = {"mean": [0.0], "std": [1.0], "max": [1.0], "min": [-1.0], "q01": [-1.0], "q99": [1.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no .*dataset_statistics.json; expected .*fix: make them with `vla data stats`"),
        ("{", "dataset_statistics.json: .*expected JSON"),
        ("{}", "without datasets"),
        (json.dumps({"d": {"num_transitions": 1}}), r"no d.action"),
        (json.dumps({"d": {"action": {k: v for k, v in GOOD.items() if k != "q99"}}}), "d.action without q99"),
        (json.dumps({"d": {"action": GOOD | {"q01": [1.0, 2.0]}}}), "d.action: .*lists of numbers, all of one length"),
        (json.dumps({"d": {"action": GOOD | {"q01": ["x"]}}}), "d.action"),
        (json.dumps({"d": {"action": GOOD | {"q01": [float("nan")]}}}), "d.action .* with 1 values not finite"),
        (json.dumps({"d": {"action": GOOD | {"mask": [True, False]}}}), r"d.action.mask .*expected 1 booleans"),
        (json.dumps({"d": {"action": GOOD, "proprio": 3}}), "d.proprio is 3"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(VlaError, match=message):
        read_statistics(path)
    if text is not None and text != "{":
        with pytest.raises(VlaError):
            write_statistics(tmp_path / "other.json", json.loads(text))
        assert not (tmp_path / "other.json").exists()


SHARES = (0.0, 0.01, 0.25, 0.5, 0.99, 1.0)
TINY = np.finfo(np.float64).smallest_subnormal


def adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    near = np.nextafter(np.float64(1), 2)
    return {
        "one row": np.array([[3.5, -2.0]]),
        "two rows": np.array([[1.0, -1.0], [2.0, -3.0]]),
        "constant": np.full((101, 2), 0.1),
        "ties": rng.integers(-2, 3, (1000, 3)).astype(np.float64),
        "zeros of both signs": np.where(rng.random((500, 2)) < 0.5, -0.0, 0.0),
        "denormals": rng.integers(-50, 50, (999, 2)) * TINY,
        "one bit apart": np.where(rng.random((400, 2)) < 0.5, 1.0, near),
        "huge": rng.normal(size=(333, 2)) * 1e38,
        "many scales": rng.normal(size=(5000, 2)) * 10.0 ** rng.integers(-300, 300, (5000, 2)),
        "sorted": np.arange(4097.0)[:, None],
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", adversarial())
def test_quantiles_are_numpys_bit_for_bit(name, dtype):
    with np.errstate(over="ignore"):
        rows = adversarial()[name].astype(dtype)
    rows = rows[np.isfinite(rows).all(1)]
    with np.errstate(over="ignore"):
        mine = quantiles(lambda: row_blocks(rows), len(rows), rows.shape[1], SHARES)
        expected = np.quantile(rows.astype(np.float64), SHARES, axis=0)
    np.testing.assert_array_equal(mine, expected)  # -0.0 equals 0.0
    if name != "zeros of both signs":
        assert mine.tobytes() == (expected + 0.0).tobytes()


def test_a_million_rows():
    rows = np.random.default_rng(1).normal(size=(1_000_000, 2)).astype(np.float32)
    entry = vector_statistics(rows, "rows")
    exact = rows.astype(np.float64)
    np.testing.assert_array_equal([entry["q01"], entry["q99"]], np.quantile(exact, [0.01, 0.99], axis=0))
    np.testing.assert_allclose(entry["mean"], exact.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(entry["std"], exact.std(0), rtol=1e-12)
    np.testing.assert_array_equal([entry["min"], entry["max"]], [exact.min(0), exact.max(0)])


def test_order_statistics_across_blocks(monkeypatch):
    monkeypatch.setattr(quantiles_module, "BLOCK_ROWS", 7)
    rows = np.random.default_rng(2).normal(size=(100, 3))
    ranks = [0, 1, 13, 50, 98, 99]
    found = order_statistics(lambda: row_blocks(rows), 3, ranks)
    np.testing.assert_array_equal(found, np.sort(rows, axis=0)[ranks])


@pytest.mark.parametrize("memory_mb", [256, 0.001])
def test_rows_that_can_be_read_once(memory_mb, tmp_path):
    rows = np.random.default_rng(3).normal(size=(5000, 4)).astype(np.float32)
    cuts = np.array_split(rows, 37)
    found = stream_statistics(iter(cuts), "stream", memory_mb, tmp_path)
    expected = vector_statistics(rows, "rows")
    assert {k: found[k] for k in ("q01", "q99", "min", "max")} == {k: expected[k] for k in ("q01", "q99", "min", "max")}
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(found["std"], expected["std"], rtol=1e-12)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    with pytest.raises(VlaError, match="stream without rows"):
        stream_statistics(iter(()), "stream")
    with pytest.raises(VlaError, match=r"rows of shape \(2, 3\).*expected \(n, 4\) float32"):
        stream_statistics(iter([cuts[0], np.zeros((2, 3), np.float32)]), "stream")
    bad = [cuts[0], np.full((1, 4), np.inf, np.float32)]
    with pytest.raises(VlaError, match=f"stream: inf at frame {len(cuts[0])}, dimension 0"):
        stream_statistics(iter(bad), "stream", memory_mb)


def test_memory_is_bounded(tmp_path):
    def chunks():
        for k in range(300):
            yield np.random.default_rng(k).normal(size=(2000, 8))

    tracemalloc.start()
    try:
        stream_statistics(chunks(), "stream", 2.0, tmp_path)  # 37 MiB in all
        # Two blocks of 2**18 rows would be 16 MiB each; here one of 600,000 rows is read in three.
        assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    finally:
        tracemalloc.stop()


def test_the_store_keeps_a_copy():
    store, buffer = RowStore(), np.zeros((2, 1))
    store.add(buffer)
    buffer[:] = 9
    store.add(buffer)
    np.testing.assert_array_equal(np.concatenate(list(store.blocks())).ravel(), [0, 0, 9, 9])


def test_constant_dimensions_are_flagged_and_keep_their_value():
    source = toy_source()
    source._actions[:, 2] = 0.25
    entry = dataset_statistics(source, gripper_dim=None)
    assert constant_dimensions(entry) == {"action": [2]}
    assert constant_warnings({"toy": entry}) == [
        "toy: action dimensions 2 never change; they are kept at their one value"
    ]
    assert "constant" not in entry and set(entry["action"]) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    normalizer = action_normalizer({"toy": entry}, None, 3)
    normalized = normalizer.normalize(source.actions())
    assert (normalized[:, 2] == -1).all()
    for predicted in (-1.0, 0.3, 1.0):
        normalized[:, 2] = predicted
        assert (normalizer.unnormalize(normalized)[:, 2] == 0.25).all()
    assert constant_dimensions(dataset_statistics(toy_source())) == {}


def test_openvla_reads_the_file_as_it_is(tmp_path):
    """What modeling_prismatic.py, openvla.py and materialize.py look up, on the JSON itself."""
    write_statistics(tmp_path / FILE, {"arm": dataset_statistics(arm_source())})
    norm_stats = json.loads((tmp_path / FILE).read_text())
    assert set(norm_stats["arm"]) == {"action", "proprio", "num_transitions", "num_trajectories"}
    stats = norm_stats["arm"]["action"]
    mask = stats.get("mask", np.ones_like(stats["q01"], dtype=bool))
    high, low = np.array(stats["q99"]), np.array(stats["q01"])
    unnormalized = np.where(mask, 0.5 * (np.zeros(7) + 1) * (high - low) + low, np.zeros(7))
    np.testing.assert_allclose(unnormalized[:6], (high + low)[:6] / 2)
    assert unnormalized[6] == 0 and len(stats["q01"]) == 7


def test_hash_of_the_data():
    source, other = toy_source(), toy_source()
    assert data_hash(source) == data_hash(other) != statistics_hash(source)
    other.revision = "abc"
    assert data_hash(source) != data_hash(other)
    source._actions[0, 0] += 1
    assert data_hash(source) != data_hash(toy_source())


def test_hash_over_declared_fields():
    source = toy_source()
    base = statistics_hash(source)
    assert base == statistics_hash(toy_source()) and len(base) == 16
    assert base != statistics_hash(source, {"split": "train[:95%]"}) != statistics_hash(source, {"split": "train"})
    assert base != statistics_hash(toy_source(name="other")) and base != statistics_hash(toy_source(3))
    assert statistics_hash(toy_source(2, 7)) != statistics_hash(toy_source(2, 8))
