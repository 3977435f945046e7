"""`vla eval replay`: the upper bound that action tokens set, measured on recorded demonstrations.

    vla eval replay --data DATASET --suite SUITE                     256 bins, the dataset's own q01 and q99
    vla eval replay --data DATASET --suite SUITE --policy DIR        the codec and statistics of a policy
    vla eval replay --data DATASET --suite SUITE --raw               the recorded actions as they are

No weights are loaded: of a policy directory only policy.json and dataset_statistics.json are read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from vla.eval.replay import ReplayPolicy, ReplayResult, TokenPath, replay
from vla.eval.suites import get_suite
from vla.files import write_json
from vla.finetune.data.statistics import dataset_statistics, read_statistics
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.unfinished import check_finished
from vla.normalize import action_normalizer, gripper_to_robot
from vla.spec import ActionSpec, read_spec, read_tokenizer
from vla.tokenizers.chunk_codec import ActionCodec
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import Episode, Suite, problem


@dataclass(frozen=True)
class Settings:
    """Replay a dataset's recorded actions in the simulator, through the action tokens."""

    data: Path
    """Folder of a LeRobot dataset (v3.0) with seeds and task names, as `vla data collect` writes it."""
    suite: str = "metaworld"
    """Simulator suite it was recorded in."""
    tasks: tuple[str, ...] = ()
    """Tasks to replay; none given: all of the dataset."""
    episodes: int | None = None
    """The first so many episodes of each task; not given: all."""
    raw: bool = False
    """Replay the actions as recorded, without tokens: shows whether simulator and dataset fit together at all."""
    policy: Path | None = None
    """Policy directory whose tokens and statistics to use; not given: uniform bins and the dataset's own quantiles."""
    unnorm_key: str | None = None
    """Whose statistics of the policy; not given: the dataset's, if the policy knows it, else the policy's own."""
    bins: int = 256
    """Bins per action dimension, without --policy."""
    horizon: int = 8
    """Actions per chunk, without --policy. Does not change results."""
    gripper: str | None = None
    """Name of the action dimension that is left un-normalised, without --policy; not given: "gripper", if there is one."""
    absolute: bool = False
    """The actions are targets, not displacements; without --policy."""
    workers: int = 2
    """Simulator processes; 0 runs the simulator in this process. Does not change results."""
    slots: int = 1
    """Environments per process. Does not change results."""
    out: Path | None = None
    """JSON file to write; not given: none."""
    dry_run: bool = False
    """Say what would be replayed and how well the tokens reconstruct it, then stop."""

    def __post_init__(self) -> None:
        if self.raw and self.policy is not None:
            raise problem("--raw and --policy", "one of them: a raw replay has no tokens", "drop one")
        if (self.episodes is not None and self.episodes < 1) or self.horizon < 1:
            raise problem(f"episodes {self.episodes}, horizon {self.horizon}", "at least 1", "correct them")


def run(settings: Settings, suite: Suite | None = None) -> ReplayResult | None:
    """Replay, print the tables, write the JSON; None after a dry run.

    Raises:
        VlaError: data without seeds or tasks, a task the suite does not have, another action space or control rate than
            the suite's or the policy's, a simulator that fails too often.
    """
    check_finished(settings.data)
    reader = LeRobotReader(settings.data)
    episodes = chosen_episodes(reader, settings.tasks, settings.episodes)
    tasks = tuple(dict.fromkeys(str(episode.task) for episode in episodes))
    suite = suite or get_suite(settings.suite, tasks)
    names = tuple(suite.action_names)
    if reader.action_names != names:
        raise problem(f"actions {', '.join(reader.action_names)} in {settings.data}", f"{', '.join(names)}, those of {suite.name}",
                      "choose the suite the data was recorded in")  # fmt: skip
    token_path, spec = (None, None) if settings.raw else _token_path(settings, reader)
    gripper = _gripper_dim(settings, reader)
    policy = ReplayPolicy(
        episodes, token_path, horizon=settings.horizon, control_hz=reader.fps,
        delta=spec.delta if spec else not settings.absolute, gripper_dim=spec.gripper_dim if spec else gripper,
    )  # fmt: skip
    if settings.dry_run:
        print(
            f"would replay {len(episodes)} episodes of {len(tasks)} tasks ({', '.join(tasks)}) as {policy.metadata['name']}"
        )
        _print_reconstruction(names, policy.reconstruction())
        return None
    result = replay(policy, suite, n_workers=settings.workers, slots_per_worker=settings.slots)
    _print_tasks(result)
    _print_reconstruction(names, result.reconstruction)
    if settings.out is not None:
        write_json(settings.out, {**result.to_json(), "settings": asdict(settings)})
        print(f"result: {settings.out}")
    return result


def chosen_episodes(reader: LeRobotReader, tasks: tuple[str, ...], per_task: int | None) -> list[Episode]:
    """Episodes without their images: of each task the first `per_task`, in the order of the data.

    Raises:
        VlaError: no such episodes, or a task the dataset does not have.
    """
    known = list(dict.fromkeys(reader.task_of(i) for i in range(reader.n_episodes)))
    if None in known:
        raise problem(f"episodes of {reader.root} without a task name", "the simulator's name of each episode's task",
                      "replay data that `vla data collect` recorded")  # fmt: skip
    unknown = sorted(set(tasks) - set(known))
    if unknown or not known:
        expected = f"one of {', '.join(map(str, known)) or 'none'}, the tasks of {reader.root}"
        raise problem(f"task {', '.join(unknown)}" if unknown else "no episodes", expected, "correct --tasks or --data")
    taken: Counter[str] = Counter()
    found = []
    for i in range(reader.n_episodes):
        task = str(reader.task_of(i))
        if (tasks and task not in tasks) or (per_task is not None and taken[task] >= per_task):
            continue
        taken[task] += 1
        found.append(reader.episode(i, cameras=()))
    return found


def _token_path(settings: Settings, reader: LeRobotReader) -> tuple[TokenPath, ActionSpec | None]:
    """The codec and normaliser; with a policy, also what its actions mean."""
    if settings.policy is None:
        gripper = _gripper_dim(settings, reader)
        statistics = {reader.name: dataset_statistics(reader, gripper_dim=gripper)}
        placement = Placement.added(0, settings.bins, model_vocab_size=settings.bins)  # ids of no model in particular
        codec = ActionCodec(UniformTokenizer(settings.bins), placement, settings.horizon, reader.action_dim)
        return TokenPath(codec, action_normalizer(statistics, reader.name, reader.action_dim)), None
    spec, statistics = read_spec(settings.policy), read_statistics(settings.policy)
    if spec.action.names != reader.action_names:
        raise problem(f"a policy of actions {', '.join(spec.action.names)}", f"{', '.join(reader.action_names)}, as in the data",
                      "replay data of the kind the policy was trained on")  # fmt: skip
    tokenizer, placement = read_tokenizer(settings.policy, spec), Placement.load(spec.tokens.placement)
    codec = ActionCodec(tokenizer, placement, spec.action.horizon, spec.action.dim)
    key = settings.unnorm_key or (reader.name if reader.name in statistics else spec.unnorm_key)
    action = spec.action

    def to_robot(actions: np.ndarray) -> np.ndarray:
        return gripper_to_robot(
            actions, action.gripper_dim, action.gripper_range, action.gripper_threshold, action.gripper_invert
        )

    return TokenPath(codec, action_normalizer(statistics, key, action.dim, action.normalization), to_robot), action


def _gripper_dim(settings: Settings, reader: LeRobotReader) -> int | None:
    names = reader.action_names
    if settings.gripper is not None and settings.gripper not in names:
        raise problem(
            f"gripper {settings.gripper!r}", f"one of {', '.join(names)}", "name an action dimension of the data"
        )
    wanted = settings.gripper or "gripper"
    return names.index(wanted) if wanted in names else None


def _print_tasks(result: ReplayResult) -> None:
    table = Table(
        Column("task", overflow="fold"),
        "recorded",
        "replayed",
        "95 %",
        "faults",
        title=f"{result.mode} on {result.suite}",
    )
    plain: dict[str, Any] = result.to_json()
    for name, counts in [*plain["tasks"].items(), ("all", plain["all"])]:
        limits = counts["wilson_95"]
        between = f"{limits[0]:.0%} .. {limits[1]:.0%}" if limits else "-"
        table.add_row(name, f"{counts['recorded']}/{counts['episodes']}", f"{counts['successes']}/{counts['trials']}",
                      between, str(counts["faults"]))  # fmt: skip
    Console().print(table)


def _print_reconstruction(names: tuple[str, ...], found: dict[str, list[float]]) -> None:
    table = Table(
        "action", "mean |error|", "largest", "clipped", title="predicted against recorded, in the units of the data"
    )
    for d, name in enumerate(names):
        table.add_row(name, f"{found['l1'][d]:.5f}", f"{found['max'][d]:.5f}", f"{found['clipped'][d]:.1%}")
    Console().print(table)
