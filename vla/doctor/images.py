"""Checks of what the policy sees, by the loss of recorded actions under other image treatments. Pure functions.

Losses are paired frame by frame, so that small but consistent differences count and large but random ones do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.doctor.evidence import Predictions
from vla.doctor.finding import DATASET, SUITE, Finding, not_checked, passed, suspect, wrong
from vla.spec import ImageSpec

MARGIN = 0.02  # nats a token: less is no difference worth a finding
SAME = 1e-6
DARKER = 4.0  # grey levels
UNLIKE = 12.0


def gain(own: np.ndarray, other: np.ndarray) -> float:
    """How far `other` is surely below `own`: the mean difference less two standard errors and a margin; > 0 counts."""
    difference = own - other
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
    return float(difference.mean() - 2 * error - MARGIN)


def better(losses: dict[str, np.ndarray], prefix: str) -> str | None:
    """The variant beginning with `prefix` that beats the policy's own treatment by most; None if none does."""
    gains = {name: gain(losses["own"], rows) for name, rows in losses.items() if name.startswith(prefix)}
    best = max(gains, key=lambda name: gains[name], default=None)
    return best if best is not None and gains[best] > 0 else None


def check_cameras(
    spec: ImageSpec, data: tuple[str, ...] | None, suite: tuple[str, ...] | None, predictions: Predictions | None
) -> Finding:
    """Are the policy's cameras there, in the order it learned, and not black?"""
    name = "cameras"
    if data is None and suite is None:
        return not_checked(name, f"{DATASET} or a suite")
    for owner, cameras in (("the dataset", data), ("the suite", suite)):
        missing = [camera for camera in spec.cameras if cameras is not None and camera not in cameras]
        if missing:
            return wrong(name, f"{', '.join(missing)} not among {owner}'s cameras: {', '.join(cameras or ())}",
                         "rename the cameras, or train with those there are")  # fmt: skip
    evidence = f"the policy sees {', '.join(spec.cameras)}"
    if predictions is None:
        return passed(name, evidence)
    black = [camera for camera, level in predictions.brightness.items() if level < 2.0]
    if black:
        return wrong(name, f"black frames from {', '.join(black)}", "mend the renderer and collect again")
    swapped = better(predictions.losses, "cameras ")
    shown = _losses(predictions.losses, "cameras ")
    if swapped:
        return wrong(
            name, f"recorded actions fit better with {swapped}: {shown}", f"set image.cameras to {swapped[8:]}"
        )
    return passed(name, f"{evidence}; {shown}")


def check_rotation(spec: ImageSpec, trained_deg: int | None, predictions: Predictions | None) -> Finding:
    """Is the policy's own turn of the image the one under which recorded actions are likeliest?

    Args:
        trained_deg: `rotation_deg` as the fine-tuning stage recorded it; None if it did not.
    """
    name = "image rotation"
    if trained_deg is not None and trained_deg != spec.rotation_deg:
        evidence = f"trained with frames turned by {trained_deg}, policy.json says {spec.rotation_deg}"
        return wrong(name, evidence, f"set image.rotation_deg to {trained_deg}")
    if predictions is None:
        return not_checked(name, DATASET)
    losses, shown = predictions.losses, _losses(predictions.losses, "rotation ")
    turned = better(losses, "rotation ")
    if turned:
        fix = f"set image.rotation_deg to {turned.split()[1]}, or turn the frames where they are made"
        return wrong(name, f"recorded actions fit better under {turned} than under {spec.rotation_deg}: {shown}", fix)
    rivals = [name for name in losses if name.startswith("rotation ") and gain(losses[name], losses["own"]) <= 0]
    if rivals:
        return suspect(
            name, f"no worse under {', '.join(rivals)}: {shown}", "see whether the policy looks at its images"
        )
    return passed(name, f"own {spec.rotation_deg}; {shown}")


def check_crop(spec: ImageSpec, trained_area: float | None, predictions: Predictions | None) -> Finding:
    """Is the crop the one of training?

    Args:
        trained_area: `crop_area` as the fine-tuning stage recorded it; None if it did not.
    """
    name = "crop"
    if trained_area is not None and abs(trained_area - spec.crop_area) > 1e-6:
        return wrong(name, f"trained with crop_area {trained_area:g}, policy.json says {spec.crop_area:g}",
                     f"set image.crop_area to {trained_area:g}")  # fmt: skip
    if predictions is None:
        if trained_area is None:
            return not_checked(name, DATASET)
        return passed(name, f"crop_area {spec.crop_area:g}, as in training")
    shown = _losses(predictions.losses, "crop ")
    other = better(predictions.losses, "crop ")
    if other:
        return suspect(name, f"recorded actions fit better under {other} than {spec.crop_area:g}: {shown}",
                       f"if training used it, set image.{'crop_order' if 'resize' in other else 'crop_area'} to {other.split()[1]}")  # fmt: skip
    return passed(name, f"crop_area {spec.crop_area:g}; {shown}")


def check_filter(spec: ImageSpec, predictions: Predictions | None) -> Finding:
    """Is the resize filter the one of training?"""
    name = "resize filter"
    if predictions is None:
        return not_checked(name, DATASET)
    shown = _losses(predictions.losses, "filter ")
    if not any(variant.startswith("filter ") for variant in predictions.losses):
        return passed(name, f"frames are {spec.size_px} px already: nothing is resized")
    other = better(predictions.losses, "filter ")
    if other:
        return suspect(name, f"recorded actions fit better with {other} than {spec.resize_filter}: {shown}",
                       f"if training used it, set image.resize_filter to {other.split()[1]}")  # fmt: skip
    return passed(name, f"{spec.resize_filter}; {shown}")


def check_jpeg(spec: ImageSpec, predictions: Predictions | None) -> Finding:
    """Do recorded actions fit better with a JPEG round trip before the policy, or without the one it makes?"""
    name = "JPEG"
    if predictions is None:
        return not_checked(name, DATASET)
    own = "no JPEG round trip" if spec.jpeg_quality is None else f"JPEG of quality {spec.jpeg_quality}"
    shown, other = _losses(predictions.losses, "JPEG"), better(predictions.losses, "JPEG")
    if other:
        value = "null" if other.endswith("none") else other.split()[1]
        fix = f"if the training frames were so (RLDS: JPEG 95), set image.jpeg_quality to {value}"
        return suspect(name, f"recorded actions fit better with {other} than with {own}: {shown}", fix)
    return passed(name, f"{own}; {shown}")


def check_image_matters(predictions: Predictions | None) -> Finding:
    """Are recorded actions less likely with the images of other frames?"""
    name, variant = "image matters", "images of other frames"
    if predictions is None:
        return not_checked(name, DATASET)
    own, other = predictions.losses["own"], predictions.losses[variant]
    shown = _losses(predictions.losses, variant)
    if np.abs(own - other).max() < SAME:
        return wrong(name, f"other images change nothing: {shown}", "see that the images reach the model")
    if gain(other, own) <= 0:
        return suspect(name, f"other images are as good: {shown}", "train longer, or on data where the image decides")
    return passed(name, shown)


def check_simulator_frames(pairs: Sequence[tuple[np.ndarray, np.ndarray]] | None, needs: str = "") -> Finding:
    """Do simulator and dataset show the same first frame of the same episode?

    Args:
        pairs: (simulator's, dataset's) uint8 (h, w, 3), reset with the episode's own seed.
        needs: what was missing if there are none.
    """
    name = "simulator frames"
    if not pairs:
        return not_checked(name, needs or f"{SUITE} and a dataset of it with seeds")
    views = {"upright": 0, "turned by 90": 1, "turned by 180": 2, "turned by 270": 3}
    apart = {text: float(np.mean([_apart(np.rot90(sim, k), data) for sim, data in pairs])) for text, k in views.items()}
    apart["flipped top to bottom"] = float(np.mean([_apart(sim[::-1], data) for sim, data in pairs]))
    best = min(apart, key=lambda text: (round(apart[text], 3), text != "upright"))
    darker = float(np.mean([data.mean() - sim.mean() for sim, data in pairs]))
    evidence = ", ".join(f"{text} {level:.1f}" for text, level in apart.items())
    evidence = f"mean difference in grey levels over {len(pairs)} pairs: {evidence}; simulator darker by {darker:.1f}"
    if best != "upright" and apart[best] < 0.7 * apart["upright"]:
        return wrong(name, f"the simulator's frames, {best}, are the data's: {evidence}",
                     "turn the frames where they are made, or set image.rotation_deg and collect again")  # fmt: skip
    if abs(darker) > DARKER or apart["upright"] > UNLIKE:
        return suspect(
            name, evidence, "use the simulator version of the data (LIBERO: MuJoCo 3.3.2 or older), same camera"
        )
    return passed(name, evidence)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference; sizes that differ are compared at the coarser one's grid."""
    height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    return float(np.abs(_shrunk(a, height, width) - _shrunk(b, height, width)).mean())


def _shrunk(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.linspace(0, image.shape[0] - 1, height).round().astype(int)
    columns = np.linspace(0, image.shape[1] - 1, width).round().astype(int)
    return image[rows][:, columns].astype(np.float64)


def _losses(losses: dict[str, np.ndarray], prefix: str) -> str:
    """`loss 0.31, rotation 90 2.4, ...`"""
    shown = [f"{name} {rows.mean():.3f}" for name, rows in losses.items() if name.startswith(prefix)]
    return ", ".join([f"loss {losses['own'].mean():.3f} a token", *shown])
