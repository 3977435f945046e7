"""Checks of what the policy answers against what was recorded, with a plot per dimension. Pure functions."""

from __future__ import annotations

import io

import numpy as np

from vla.doctor.evidence import Predictions
from vla.doctor.finding import DATASET, Finding, not_checked, passed, suspect, wrong

CONSTANT = 0.05  # of the recorded spread
ACCURATE = 0.95  # OpenVLA stops training there


def l1_by_dim(predictions: Predictions) -> np.ndarray:
    """float64 (D,) mean absolute error in physical units over valid steps of decodable answers."""
    keep = predictions.valid & predictions.ok[:, None]
    return np.abs(predictions.truth[keep] - predictions.predicted[keep]).astype(np.float64).mean(0)


def l1_by_step(predictions: Predictions) -> np.ndarray:
    """float64 (H,) mean error of each step of a chunk, every dimension over its spread; NaN where no step is valid."""
    spread = np.maximum(predictions.truth[predictions.valid].std(0), 1e-9)
    error = (np.abs(predictions.truth - predictions.predicted) / spread).mean(2)
    keep = predictions.valid & predictions.ok[:, None]
    return np.array([error[keep[:, h], h].mean() if keep[:, h].any() else np.nan for h in range(keep.shape[1])])


def check_predictions(predictions: Predictions | None) -> Finding:
    """Are predicted actions nearer to the recorded ones than their mean is, in every dimension?"""
    name = "predictions"
    if predictions is None:
        return not_checked(name, DATASET)
    keep = predictions.valid & predictions.ok[:, None]
    if not keep.any():
        return wrong(name, "no answer could be decoded", "see `undecodable`")
    truth, predicted = predictions.truth[keep], predictions.predicted[keep]
    l1, moves = l1_by_dim(predictions), truth.std(0) > 1e-9
    baseline = np.abs(truth - np.median(truth, axis=0)).mean(0)
    constant = [
        n for d, n in enumerate(predictions.names) if moves[d] and predicted[:, d].std() < CONSTANT * truth[:, d].std()
    ]
    useless = [n for d, n in enumerate(predictions.names) if moves[d] and l1[d] >= baseline[d]]
    shown = ", ".join(f"{n} {l1[d]:.4g} (a constant: {baseline[d]:.4g})" for d, n in enumerate(predictions.names))
    evidence, plot = f"L1 in physical units: {shown}", plot_predictions(predictions)
    fix = "look for the cause among the other rows; if none is wrong, train longer or lower the learning rate"
    if constant and len(constant) == moves.sum():
        return wrong(name, f"the same action whatever is seen; {evidence}", fix, plot)
    if 2 * len(useless) > moves.sum():
        return wrong(name, f"no better than a constant in {', '.join(useless)}; {evidence}", fix, plot)
    if useless or constant:
        return suspect(name, f"no better than a constant in {', '.join(useless or constant)}; {evidence}", fix, plot)
    return passed(name, evidence, plot)


def check_token_accuracy(predictions: Predictions | None) -> Finding:
    """Do the tokens stay right when the policy reads its own, not the recorded, ones?"""
    name = "token accuracy"
    if predictions is None:
        return not_checked(name, DATASET)
    valid = predictions.valid_tokens
    teacher = float((predictions.teacher_ids == predictions.truth_ids)[valid].mean())
    free = float((predictions.free_ids == predictions.truth_ids)[valid].mean())
    n_dims = len(predictions.names)
    by_dim = [
        f"{n} {(predictions.free_ids == predictions.truth_ids)[:, d::n_dims][valid[:, d::n_dims]].mean():.0%}"
        for d, n in enumerate(predictions.names)
    ] if valid.shape[1] % n_dims == 0 and valid.shape[1] == n_dims * predictions.valid.shape[1] else []  # fmt: skip
    evidence = f"teacher-forced {teacher:.1%}, free-running {free:.1%}" + (f" ({', '.join(by_dim)})" if by_dim else "")
    if teacher > 0.2 and free < 0.5 * teacher:
        fix = "train longer, use shorter chunks, or vary the data: errors feed on themselves"
        return wrong(name, f"most of the accuracy is the recorded tokens' own: {evidence}", fix)
    if teacher - free > 0.1 or teacher < 0.5:
        fix = f"train longer; OpenVLA stops when teacher-forced accuracy passes {ACCURATE:.0%}"
        return suspect(name, evidence, fix)
    return passed(name, evidence)


def check_undecodable(predictions: Predictions | None) -> Finding:
    """Share of answers that are no action chunk."""
    name = "undecodable"
    if predictions is None:
        return not_checked(name, DATASET)
    n, bad = len(predictions.ok), int((~predictions.ok).sum())
    evidence, fix = f"{bad} of {n} answers are no action chunk", "keep decoding constrained to legal ids; train longer"
    if bad > 0.05 * n:
        return wrong(name, evidence, fix)
    return suspect(name, evidence, fix) if bad else passed(name, evidence)


def plot_predictions(predictions: Predictions) -> bytes:
    """PNG: per dimension the first action of each chunk, recorded and predicted, over the sampled frames."""
    from matplotlib.figure import Figure

    n = len(predictions.names)
    columns = min(n, 4)
    rows = -(-n // columns)
    figure, l1 = Figure(figsize=(3.1 * columns, 2.1 * rows), layout="constrained"), l1_by_dim(predictions)
    for d, name in enumerate(predictions.names):
        axes = figure.add_subplot(rows, columns, d + 1)
        axes.plot(predictions.truth[:, 0, d], color="#2a6fc9", linewidth=1.2, label="recorded")
        axes.plot(predictions.predicted[:, 0, d], color="#d9622b", linewidth=1.0, linestyle="--", label="predicted")
        axes.set_title(f"{name}: L1 {l1[d]:.3g}", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
