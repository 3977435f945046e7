"""One pass over an RLDS dataset: the numbers of every frame, and where its images lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vla.finetune.data.standard import Standard, Standardizer
from vla.finetune.formats.source import BadEpisode
from vla.finetune.formats.tf_example import parse_example
from vla.finetune.formats.tfds_features import Leaf, column, episode_length
from vla.finetune.formats.tfds_info import DATASET_INFO, ShardSlice
from vla.finetune.formats.tfrecord import Record, read_records
from vla.progress import Progress
from vla.types import VlaError, problem

REWARD = "reward"


@dataclass(frozen=True)
class Rows:
    """N frames of E episodes, as arrays."""

    actions: np.ndarray
    """float32 (N, D)."""
    states: np.ndarray
    """float32 (N, S); (N, 0) if there is none."""
    rewards: np.ndarray
    """float32 (N,), or (0,) if there is none."""
    spans: np.ndarray
    """int64 (N, C, 2): first byte in the file, and length, of each camera's encoded image."""
    steps: np.ndarray
    """int32 (N,): the recorded step."""
    texts: np.ndarray
    """int32 (N,): the frame's instruction, as an index."""
    lengths: np.ndarray
    """int64 (E,): frames of each episode."""
    places: np.ndarray
    """int64 (E, 4): shard slice, record in the file, first byte of its data, bytes of data."""


@dataclass(frozen=True)
class Index:
    """What the pass found."""

    rows: Rows
    instructions: tuple[str, ...]
    bad: tuple[BadEpisode, ...]


@dataclass(frozen=True)
class Plan:
    """What the pass reads, and how."""

    root: Path
    slices: Sequence[ShardSlice]
    leaves: dict[str, Leaf]
    rule: Standardizer
    cameras: tuple[str, ...]
    """Keys of the images, in the order of the cameras."""
    skip_bad: bool

    @property
    def has_reward(self) -> bool:
        leaf = self.leaves.get(REWARD)
        return leaf is not None and leaf.kind == "number" and leaf.size == 1 and leaf.in_steps and not leaf.ragged

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the columns that are read."""
        return (*self.rule.keys, *((REWARD,) if self.has_reward else ()))


def build(plan: Plan) -> Index:
    """The pass.

    Raises:
        VlaError: a record that is damaged or does not hold what the rule needs, unless `plan.skip_bad`; nothing is left.
    """
    parts: list[Rows] = []
    bad: list[BadEpisode] = []
    instructions: dict[str, int] = {}
    if not plan.skip_bad:
        _check_shards(plan)
    with Progress(f"indexing {plan.root}", sum(part.take for part in plan.slices)) as progress:
        for number, part in enumerate(plan.slices):
            left = part.take
            for record in _records(part):
                try:
                    rows = read_episode(plan, number, record, instructions)
                except VlaError as error:
                    if not plan.skip_bad:
                        raise
                    bad.append(BadEpisode(str(part.path), record.index, str(error)))
                else:
                    if len(rows.actions):
                        parts.append(rows)
                    else:
                        bad.append(BadEpisode(str(part.path), record.index, "no steps"))
                progress.advance(min(left, 1))
                left -= min(left, 1)
            progress.advance(left)
    if not parts:
        raise problem(f"{plan.root} without one usable episode" + (f" (first: {bad[0].why})" if bad else ""),
                      "at least one", "copy the dataset again")  # fmt: skip
    rows = Rows(**{field.name: np.concatenate([vars(part)[field.name] for part in parts]) for field in fields(Rows)})
    return Index(rows, tuple(instructions), tuple(bad))


def _check_shards(plan: Plan) -> None:
    missing = sorted({part.path for part in plan.slices if not part.path.is_file()})
    if missing:
        raise problem(f"{len(missing)} of {len(plan.slices)} shards missing, the first {missing[0]}", "all of them",
                      "copy the dataset again, or read what there is with --skip-bad")  # fmt: skip


def read_episode(plan: Plan, slice_number: int, record: Record, instructions: dict[str, int]) -> Rows:
    """The rows of one record; new instructions are added. VlaError naming file and record, if it cannot be used."""
    if record.fault is not None:
        raise record.fault
    where = f"{plan.slices[slice_number].path}: record {record.index}"
    names = {name for key in (*plan.keys, *plan.cameras) for name in plan.leaves[key].names}
    example = parse_example(record.data, where, names)
    n = episode_length(plan.leaves, example, where)
    columns = {key: column(plan.leaves[key], example, record.data, n, where) for key in plan.keys}
    try:
        standard = plan.rule({key: columns[key] for key in plan.rule.keys})
    except VlaError as error:
        raise VlaError(f"{where}: {error}") from error
    _check(plan, standard, n, where)
    spans = np.zeros((n, len(plan.cameras), 2), np.int64)
    for c, key in enumerate(plan.cameras):
        feature = example.get(plan.leaves[key].stored)
        if feature is None or feature.kind != "bytes" or len(feature.values) != n:
            got = "none" if feature is None else len(feature.values)
            raise problem(f"{where}: {got} images of {key!r}", f"{n}, one per step", "copy the dataset again")
        spans[:, c] = feature.values
    spans[..., 0] += record.offset
    kept, m = standard.frames, len(standard.actions)
    states = standard.states if plan.rule.state_names and standard.states is not None else np.zeros((m, 0), np.float32)
    rewards = columns[REWARD].reshape(n)[kept].astype(np.float32) if plan.has_reward else np.zeros(0, np.float32)
    texts = [instructions.setdefault(text, len(instructions)) for text in standard.instructions]
    place = np.array([[slice_number, record.index, record.offset, len(record.data)]], np.int64)
    return Rows(standard.actions.astype(np.float32, copy=False), states.astype(np.float32, copy=False),
                 rewards, spans[kept], kept.astype(np.int32), np.array(texts, np.int32),
                np.array([m], np.int64), place)  # fmt: skip


def _records(part: ShardSlice) -> Iterator[Record]:
    """The records of a slice; with a fault each that is not there, and one if the shard holds more than it should."""
    seen, stop = part.skip, part.skip + part.take
    ends_with_shard = int(stop == part.length)
    try:
        for record in read_records(part.path, part.skip, part.take + ends_with_shard):
            seen = record.index + 1
            if seen > stop:
                yield Record(record.index, record.offset, b"", _count(part, f"more than {stop}"))
            else:
                yield record
    except VlaError as error:  # the file cannot be opened
        for missing in range(part.skip, stop):
            yield Record(missing, 0, b"", error)
        return
    for missing in range(seen, stop):
        yield Record(missing, 0, b"", _count(part, f"only {seen} of {stop} readable"))


def _count(part: ShardSlice, got: str) -> VlaError:
    return problem(
        f"{part.path} with {got} records", f"{part.length}, as {DATASET_INFO} says", "copy the dataset again"
    )


def _check(plan: Plan, standard: Standard, n: int, where: str) -> None:
    """A rule's answer is of the promised shape and finite."""
    m, rule = len(standard.actions), plan.rule
    frames = standard.frames
    if len(frames) != m or len(standard.instructions) != m or (m and not 0 <= frames.min() <= frames.max() < n):
        raise problem(f"{where}: {m} actions, {len(frames)} frames, {len(standard.instructions)} instructions",
                      f"as many of each, with frames below {n}", "mend the standardizer")  # fmt: skip
    shapes = {"actions": (standard.actions, len(rule.action_names), rule.action_names)}
    if rule.state_names:
        empty = np.zeros((0, 0), np.float32)
        states = empty if standard.states is None else standard.states
        shapes["states"] = (states, len(rule.state_names), rule.state_names)
    for name, (values, width, dimensions) in shapes.items():
        if values.shape != (m, width):
            raise problem(f"{where}: {name} of shape {values.shape}", f"({m}, {width})", "mend the standardizer")
        finite = np.isfinite(values)
        if not finite.all():
            row, d = np.argwhere(~finite)[0]
            raise problem(f"{where}: {values[row, d]} in {name}, step {standard.frames[row]}, dimension {d} ({dimensions[d]})",
                          "finite numbers", "mend the dataset, or leave the episode out with --skip-bad")  # fmt: skip
