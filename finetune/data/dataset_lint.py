"""What is wrong with the content of a dataset, of any format: faults that every file check passes and a policy learns.

Numbers alone are read, and the first frame of episodes that look the same. Each check is a heuristic with its threshold
in `Limits`; what it cannot tell (an unnamed gripper, no proprioception) it leaves out rather than guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla.finetune.data.data_quality import Quality, measure_quality
from vla.finetune.data.dataset_check import Finding
from vla.finetune.data.gripper_lint import check_gripper, gripper_dim
from vla.finetune.data.rate_lint import check_rate
from vla.finetune.demonstrate import noops
from vla.finetune.formats.source import FrameSource
from vla.types import VlaError

ARM_ACTION_DIM = 7
NO_INSTRUCTION = (
    "",
    "none",
    "null",
    "nan",
    "n/a",
    "na",
    "unknown",
    "todo",
    "task",
    "dummy instruction",
    "no instruction",
)
STILL = 1e-4
"""Of a state dimension's range over the dataset: less than this between two frames is no motion."""
AGREEMENT = 0.1
"""Action divergence below which demonstrators agree: an episode is compared with at least this."""
MAD_TO_STD = 1.4826
"""Of a normal distribution."""


@dataclass(frozen=True)
class Limits:
    """Where a check begins to complain."""

    noop_share: float = 0.05
    """Share of no-ops in an episode; OpenVLA drops all of them."""
    idle_share: float = 0.3
    """Share of an episode in which neither state nor action changes."""
    idle_run_s: float = 3.0
    """Longest such run, seconds (frames / 10 where the rate is unknown)."""
    outlier_mads: float = 20.0
    """Distance from the median in (normalised) median absolute deviations, and ..."""
    outlier_ranges: float = 1.5
    """... distance beyond q01 and q99 in multiples of q99 - q01. Both must be exceeded."""
    rate_factor: float = 1.6
    """An episode's motion per unit of action, relative to the dataset's median."""
    quality_factor: float = 3.0
    """An episode's action divergence, relative to the dataset's median."""


@dataclass(frozen=True)
class Report:
    """Everything found, and the measures of "Data Quality in Imitation Learning"."""

    findings: list[Finding]
    quality: Quality | None
    """None if the data has no proprioception, or too few frames."""


def lint(source: FrameSource, against: FrameSource | None = None, limits: Limits = Limits()) -> Report:
    """All checks. `against`: a test set, no episode of which may be in `source`."""
    findings: list[Finding] = []
    for check in CHECKS.values():
        findings += check(source, limits)
    if against is not None:
        findings += check_leaks(source, against)
    quality = measure_quality(source)
    if quality is not None:
        findings += _check_quality(quality, limits)
    return Report(findings, quality)


def check_noops(source: FrameSource, limits: Limits) -> list[Finding]:
    """Actions that ask for no motion, by the rule of `demonstrate.noops`; of arms (6 displacements and a gripper) only."""
    if source.action_dim != ARM_ACTION_DIM or gripper_dim(source) != ARM_ACTION_DIM - 1:
        return []
    runs = {span.index: noops(source.actions()[span.start : span.stop]) for span in source.episodes}
    over = [k for k, flags in runs.items() if flags.mean() > limits.noop_share]
    if not over:
        return []
    total = sum(int(flags.sum()) for flags in runs.values()) / len(source)
    worst = max(over, key=lambda k: runs[k].mean())
    text = (f"{len(over)} of {len(runs)} episodes with more than {limits.noop_share:.0%} no-ops ({total:.1%} of all frames); "
            f"worst: episode {worst}, {runs[worst].mean():.0%}, longest run {longest_run(runs[worst])} frames")  # fmt: skip
    return [
        Finding("warning", text, "noops", tuple(over), "`vla data filter --drop-noops`: a policy learns the pauses")
    ]


def check_idle(source: FrameSource, limits: Limits) -> list[Finding]:
    """Frames that repeat the one before: same action, and a state that has not moved."""
    ranges, spans = state_ranges(source), source.episodes if source.state_dim else ()
    idle = {span.index: idle_frames(source, span.index, ranges) for span in spans}
    longest = limits.idle_run_s * (source.fps or 10.0)
    over = [k for k, flags in idle.items() if flags.mean() > limits.idle_share or longest_run(flags) > longest]
    if not over:
        return []
    worst = max(over, key=lambda k: longest_run(idle[k]))
    text = (f"{len(over)} of {len(idle)} episodes stand still for more than {limits.idle_share:.0%} of their frames or "
            f"{limits.idle_run_s:g} s on end; worst: episode {worst}, {idle[worst].mean():.0%}, longest run "
            f"{longest_run(idle[worst])} frames")  # fmt: skip
    return [Finding("warning", text, "idle", tuple(over), "`vla data filter --drop-idle`, or cut the recordings' ends")]


def state_ranges(source: FrameSource) -> np.ndarray:
    """float32 (S,): how far each state dimension goes over the dataset, for `idle_frames`."""
    states = source.states()
    return np.zeros(0, np.float32) if states is None or not len(states) else np.ptp(states, axis=0)


def idle_frames(source: FrameSource, episode: int, ranges: np.ndarray) -> np.ndarray:
    """bool (length,): frames with the action of the frame before and, within `STILL` of each of `state_ranges`, its state."""
    span, states = source.episodes[episode], source.states()
    flags = np.zeros(span.stop - span.start, bool)
    if states is None:
        return flags
    moved = (np.abs(np.diff(states[span.start : span.stop], axis=0)) > STILL * np.maximum(ranges, 1e-12)).any(1)
    changed = (np.diff(source.actions()[span.start : span.stop], axis=0) != 0).any(1)
    flags[1:] = ~moved & ~changed
    return flags


def longest_run(flags: np.ndarray) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def check_outliers(source: FrameSource, limits: Limits) -> list[Finding]:
    """Values far beyond all others of their dimension: glitches that stretch a q01..q99 or min..max normalisation."""
    findings = []
    grip = gripper_dim(source)
    for kind, rows, names in (("action", source.actions(), source.action_names),
                              ("state", source.states(), source.state_names)):  # fmt: skip
        if rows is None:
            continue
        for dim, name in enumerate(names):
            if kind == "action" and dim == grip:
                continue
            values = rows[:, dim].astype(np.float64)
            frames = np.flatnonzero(outliers(values, limits))
            if not len(frames):
                continue
            episodes = sorted({source.episode_of(int(i)) for i in frames})
            worst = int(frames[np.abs(values[frames] - np.median(values)).argmax()])
            q01, q99 = np.nanquantile(values, [0.01, 0.99])
            text = (f"{kind} {name}: {len(frames)} values far outside q01..q99 = {q01:.4g}..{q99:.4g}; the furthest is "
                    f"{values[worst]:.4g} at frame {worst - source.episodes[source.episode_of(worst)].start} of episode "
                    f"{source.episode_of(worst)}")  # fmt: skip
            findings.append(
                Finding("warning", text, "outliers", tuple(episodes), "drop these episodes or mend the values")
            )
    return findings


def outliers(values: np.ndarray, limits: Limits) -> np.ndarray:
    """bool (N,): beyond the median by `outlier_mads` MADs and beyond q01..q99 by `outlier_ranges` of its width."""
    finite = np.isfinite(values)
    if finite.sum() < 2:
        return np.zeros(len(values), bool)
    median = np.median(values[finite])
    mad = MAD_TO_STD * np.median(np.abs(values[finite] - median))
    q01, q99 = np.quantile(values[finite], [0.01, 0.99])
    margin = limits.outlier_ranges * (q99 - q01)
    if not mad and not margin:  # constant but for a few frames: a switch, not a measurement
        return np.zeros(len(values), bool)
    return (
        finite
        & (np.abs(values - median) > limits.outlier_mads * mad)
        & ((values < q01 - margin) | (values > q99 + margin))
    )


def check_instructions(source: FrameSource, limits: Limits) -> list[Finding]:
    """Episodes without a text that says what to do; texts that differ in case, spaces or the full stop alone."""
    texts = [source.instruction_of(span.start) for span in source.episodes]
    missing = tuple(k for k, text in enumerate(texts) if text.strip().lower() in NO_INSTRUCTION)
    findings = []
    if missing:
        findings.append(Finding("error", f"{len(missing)} of {len(texts)} episodes without an instruction", "instructions",
                                missing, "give them one (`vla data convert --to lerobot --instruction`), or drop them"))  # fmt: skip
    spellings: dict[str, dict[str, list[int]]] = {}
    for k, text in enumerate(texts):
        spellings.setdefault(" ".join(text.lower().split()).rstrip(".!"), {}).setdefault(text, []).append(k)
    for forms in spellings.values():
        if len(forms) > 1 and not set(missing) & set(sum(forms.values(), [])):
            rarest = min(forms, key=lambda form: len(forms[form]))
            findings.append(Finding("warning", f"one instruction in {len(forms)} spellings: {', '.join(map(repr, forms))}",
                                    "instructions", tuple(forms[rarest]), "write it one way"))  # fmt: skip
    return findings


def check_duplicates(source: FrameSource, limits: Limits) -> list[Finding]:
    """Episodes with the same actions and the same first frame."""
    groups: dict[str, list[int]] = {}
    for span in source.episodes:
        groups.setdefault(action_hash(source, span.index), []).append(span.index)
    findings = []
    for group in groups.values():
        alike: dict[str, list[int]] = {}
        for k in group if len(group) > 1 else ():
            alike.setdefault(first_frame_hash(source, k), []).append(k)
        for same in alike.values():
            if len(same) > 1:
                text = f"episodes {', '.join(map(str, same))} are the same: actions and first frame"
                findings.append(Finding("warning", text, "duplicates", tuple(same[1:]), "drop all but one"))
    return findings


def check_leaks(source: FrameSource, against: FrameSource) -> list[Finding]:
    """Episodes that are in both: the same actions, or the same task from the same seed."""
    theirs = {action_hash(against, span.index): span.index for span in against.episodes}
    pairs = [(span.index, theirs.get(action_hash(source, span.index))) for span in source.episodes]
    shared = [(mine, other) for mine, other in pairs if other is not None]
    findings = []
    if shared:
        shown = ", ".join(f"{mine} = {other}" for mine, other in shared[:5]) + (" ..." if len(shared) > 5 else "")
        text = f"{len(shared)} episodes are also in {against.where} (same actions): {shown}"
        findings.append(
            Finding("error", text, "leaks", tuple(mine for mine, _ in shared), "drop them from one of the two")
        )
    starts = {(against.task_of(k), against.seed_of(k)) for k in range(against.n_episodes)}
    found = {mine for mine, _ in shared}
    again = tuple(k for k in range(source.n_episodes)
                  if source.seed_of(k) is not None and (source.task_of(k), source.seed_of(k)) in starts and k not in found)  # fmt: skip
    if again:
        text = f"{len(again)} episodes begin from the same seed of the same task as one of {against.where}"
        findings.append(Finding("error", text, "leaks", again, "collect with other seeds"))
    return findings


def action_hash(source: FrameSource, episode: int) -> str:
    """Of an episode's actions, bit for bit."""
    span = source.episodes[episode]
    return hashlib.sha256(
        np.ascontiguousarray(source.actions()[span.start : span.stop], np.float32).tobytes()
    ).hexdigest()


def first_frame_hash(source: FrameSource, episode: int) -> str:
    """Of the first frame of every camera, where it can be decoded; of the first state where there is no camera."""
    start, states = source.episodes[episode].start, source.states()
    digest = hashlib.sha256()
    for camera in sorted(source.cameras):
        try:
            digest.update(source.images(start, [camera])[camera].tobytes())
        except VlaError as error:  # `check_source` reports it; such a frame is like no other
            digest.update(str((episode, error)).encode())
    if not source.cameras and states is not None:
        digest.update(states[start].tobytes())
    return digest.hexdigest()


def _check_quality(quality: Quality, limits: Limits) -> list[Finding]:
    values = np.array(quality.episode_divergence)
    typical = float(np.median(values))
    over = tuple(int(k) for k in np.flatnonzero(values > limits.quality_factor * max(typical, AGREEMENT)))
    if len(values) < 5 or not over:
        return []
    text = (f"{len(over)} episodes act differently from the others in similar states: action divergence up to "
            f"{values.max():.2f}, median {typical:.2f}")  # fmt: skip
    return [Finding("warning", text, "quality", over, "look at them (`vla data viz`): another style, or mistakes")]


def _check_gripper(source: FrameSource, limits: Limits) -> list[Finding]:
    return check_gripper(source)


def _check_rate(source: FrameSource, limits: Limits) -> list[Finding]:
    return check_rate(source, limits.rate_factor)


CHECKS: dict[str, Callable[[FrameSource, Limits], Sequence[Finding]]] = {
    "noops": check_noops,
    "idle": check_idle,
    "gripper": _check_gripper,
    "outliers": check_outliers,
    "rate": _check_rate,
    "duplicates": check_duplicates,
    "instructions": check_instructions,
}
