"""Was every episode recorded at the rate the dataset claims? The robot's own motion tells."""

from __future__ import annotations

import numpy as np

from vla.finetune.data.dataset_check import Finding
from vla.finetune.formats.source import FrameSource

PLAUSIBLE_FPS = (1.0, 120.0)
MIN_EPISODES = 4
MIN_FRAMES = 10
FOLLOWS = 0.5
"""Correlation from which on a state dimension is taken to follow an action dimension."""
HELD_SHARE = 0.4
"""Of the frames that ask for motion: with so many states exactly as before, states were recorded at a lower rate."""


def check_rate(source: FrameSource, factor: float) -> list[Finding]:
    """An unknown or implausible rate; episodes that move `factor` times as far per action as the others, or less by it;
    states that change only in every second frame or less often."""
    findings = []
    low, high = PLAUSIBLE_FPS
    if not source.fps:
        findings.append(Finding("warning", "the data does not say its rate", "rate", (), "pass --fps when converting"))
    elif not low <= source.fps <= high:
        text = f"{source.fps:g} fps; robots are controlled at {low:g} to {high:g}"
        findings.append(Finding("warning", text, "rate", (), "correct the rate in the data"))
    states = source.states()
    if states is None or not len(source):
        return findings
    return findings + _check_held(source, states) + _check_gain(source, states, factor)


def _check_held(source: FrameSource, states: np.ndarray) -> list[Finding]:
    found = {}
    for span in source.episodes:
        rows, actions = states[span.start : span.stop], source.actions()[span.start : span.stop]
        moves = (np.diff(rows, axis=0) != 0).any(1)
        asked = (np.diff(actions, axis=0) != 0).any(1)  # an action that stays as it was may ask for nothing
        if len(moves) < MIN_FRAMES or asked.sum() < MIN_FRAMES or not moves.any():
            continue
        held = float(1 - moves[asked].mean())
        gaps = np.diff(np.flatnonzero(moves))
        period = int(np.bincount(gaps).argmax()) if len(gaps) else 0
        if held > HELD_SHARE and period > 1:
            found[span.index] = period
    if not found:
        return []
    period = int(np.bincount(list(found.values())).argmax())
    text = f"in {len(found)} episodes the state changes in every {_ordinal(period)} frame only, though actions change"
    fix = f"states were recorded at {source.fps / period:g} fps: record them at {source.fps:g}, or thin the episodes"
    return [Finding("warning", text, "rate", tuple(found), fix)]


def _check_gain(source: FrameSource, states: np.ndarray, factor: float) -> list[Finding]:
    """Motion per unit of action: a rate that is twice as high as the others' halves it."""
    pairs = _followers(source, states)
    spans = [span for span in source.episodes if span.stop - span.start >= MIN_FRAMES]
    if not pairs or len(spans) < MIN_EPISODES:
        return []
    gains = []
    for span in spans:
        moved = np.abs(np.diff(states[span.start : span.stop], axis=0))[:, [s for s, _ in pairs]].sum(0)
        asked = np.abs(source.actions()[span.start : span.stop - 1])[:, [a for _, a in pairs]].sum(0)
        gains.append(float(np.median(moved / np.maximum(asked, 1e-9))))
    ratio = np.array(gains) / max(float(np.median(gains)), 1e-12)
    odd = [k for k, r in enumerate(ratio) if not 1 / factor < r < factor]
    if not odd or len(odd) > len(spans) // 2:
        return []
    worst = max(odd, key=lambda k: abs(np.log(max(ratio[k], 1e-12))))
    text = (f"{len(odd)} episodes move further or less far per action than the others; episode {spans[worst].index} "
            f"{ratio[worst]:.2g} times as far")  # fmt: skip
    fix = "were they recorded at another rate, or with other units? resample or drop them"
    return [Finding("warning", text, "rate", tuple(spans[k].index for k in odd), fix)]


def _followers(source: FrameSource, states: np.ndarray) -> list[tuple[int, int]]:
    """(state, action) dimensions of which the state's change follows the action: displacement control. Found by
    correlation, because names differ; absolute actions and joint states give none, and nothing is said about them."""
    inner = np.setdiff1d(np.arange(len(source)), [span.stop - 1 for span in source.episodes])
    change, actions = (states[inner + 1] - states[inner]).astype(np.float64), source.actions()[inner].astype(np.float64)
    good = np.isfinite(change).all(1) & np.isfinite(actions).all(1)
    change, actions = change[good], actions[good]
    if len(change) < MIN_FRAMES:
        return []
    change, actions = change - change.mean(0), actions - actions.mean(0)
    scale = np.sqrt(np.outer((change**2).sum(0), (actions**2).sum(0)))
    correlation = np.abs(change.T @ actions) / np.maximum(scale, 1e-12)
    best = correlation.argmax(1)
    return [(s, int(a)) for s, a in enumerate(best) if correlation[s, a] > FOLLOWS]


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
