"""What the checks of `vla doctor` look at: a dataset's numbers, and what the policy answers to some of its frames."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vla.finetune.data.chunks import ChunkDataset
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.sft_setup import observation_of, show_history
from vla.inputs import prepare_images, prepare_prompt
from vla.policy import LocalPolicy
from vla.spec import ImageSpec
from vla.tokenizers.protocol import PAD
from vla.tokenizers.rows import padded
from vla.types import Observation

JPEG_QUALITY = 95  # TensorFlow's default, with which RLDS datasets are made
BATCH = 8
ROTATIONS = (0, 90, 180, 270)
CROPS = (1.0, 0.9)


@dataclass(frozen=True)
class DataView:
    """A dataset's numbers. N frames, E episodes."""

    name: str
    actions: np.ndarray
    """float32 (N, D)."""
    states: np.ndarray | None
    """float32 (N, S)."""
    starts: np.ndarray
    """int64 (E,) first frame of each episode."""
    stops: np.ndarray
    """int64 (E,) one beyond its last."""
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    cameras: tuple[str, ...]
    fps: float
    instructions: tuple[str, ...]
    """Those in use."""
    seeds: tuple[int, ...] = ()
    """Known seeds."""
    success: np.ndarray | None = None
    """bool (N,), None if the data does not say."""

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    def pairs(self) -> np.ndarray:
        """int64: frames t whose successor t + 1 is in the same episode."""
        inside = np.ones(len(self.actions), bool)
        inside[self.stops - 1] = False
        return np.flatnonzero(inside)


@dataclass(frozen=True)
class Predictions:
    """What the policy answers to B frames of one dataset."""

    names: tuple[str, ...]
    """Of the D action dimensions."""
    truth: np.ndarray
    """float32 (B, H, D), recorded, un-normalised."""
    valid: np.ndarray
    """bool (B, H): False beyond the end of the episode."""
    predicted: np.ndarray
    """float32 (B, H, D), un-normalised as the policy would execute it; NaN where not `ok`."""
    ok: np.ndarray
    """bool (B,)."""
    truth_ids: np.ndarray
    """int64 (B, T), padded with -1."""
    teacher_ids: np.ndarray
    """int64 (B, T): best legal id at each position given the recorded ids before it."""
    free_ids: np.ndarray
    """int64 (B, T): greedy decoding, padded with -1, cut or filled up to the T of the recorded ids."""
    losses: dict[str, np.ndarray]
    """Variant -> float64 (B,) mean teacher-forced token loss over valid tokens. "own" is the policy as it is; the
    others, named by `variants`, are counterfactuals such as "rotation 90" or "crop 0.9"."""
    brightness: dict[str, float]
    """Camera -> mean grey level of its frames, 0..255."""
    valid_tokens: np.ndarray
    """bool (B, T): recorded tokens that count, as in training."""


def view(reader: LeRobotReader) -> DataView:
    """The numbers of an open dataset."""
    seeds = [reader.seed_of(i) for i in range(reader.n_episodes)]
    instructions = dict.fromkeys(reader.instruction_of(row.start) for row in reader.episodes)
    success = reader.column("next.success").reshape(-1).astype(bool) if "next.success" in reader.features else None
    return DataView(
        reader.name, reader.actions(), reader.states(), np.array([row.start for row in reader.episodes], np.int64),
        np.array([row.stop for row in reader.episodes], np.int64), tuple(reader.action_names),
        tuple(reader.state_names), tuple(reader.cameras), reader.fps, tuple(instructions),
        tuple(seed for seed in seeds if seed is not None), success,
    )  # fmt: skip


def lacking(policy: LocalPolicy, data: DataView) -> str | None:
    """What a dataset would need before the policy can be asked about it; None if nothing."""
    if len(data.action_names) != policy.spec.action.dim:
        return f"a dataset with {policy.spec.action.dim} action dimensions; {data.name} has {len(data.action_names)}"
    missing = [name for name in policy.spec.image.cameras if name not in data.cameras]
    if missing:
        return f"camera {', '.join(missing)} in {data.name}, which has {', '.join(data.cameras) or 'none'}"
    if policy.spec.head is not None:
        return "a policy that answers token after token; this one decodes whole chunks in one pass, which is not compared here"
    shown = len(policy.spec.prompt.state_names)
    if shown and shown != len(data.state_names):
        return f"a state of {shown} dimensions in {data.name}, which has {len(data.state_names)}"
    return None


def variants(policy: LocalPolicy, observations: Sequence[Observation]) -> dict[str, Callable[[int], Variant]]:
    """Name -> observation number -> the inputs of that counterfactual."""
    spec, found = policy.spec.image, {}

    def add(name: str, image: ImageSpec = spec, change: Callable[[int], Observation] | None = None) -> None:
        found[name] = lambda i: Variant(change(i) if change else observations[i], image)

    for degrees in ROTATIONS[1:]:
        turned = (spec.rotation_deg + degrees) % 360
        add(f"rotation {turned}", dataclasses.replace(spec, rotation_deg=turned))
    for area in CROPS:
        if area != spec.crop_area:
            add(f"crop {area:g}", dataclasses.replace(spec, crop_area=area))
    for name in ("nearest", "bilinear", "bicubic", "lanczos", "lanczos3"):
        if name != spec.resize_filter and _resizes(observations, spec):
            add(f"filter {name}", dataclasses.replace(spec, resize_filter=name))
    if spec.jpeg_quality is None:
        add(f"JPEG {JPEG_QUALITY}", dataclasses.replace(spec, jpeg_quality=JPEG_QUALITY))
    else:
        add("JPEG none", dataclasses.replace(spec, jpeg_quality=None))
    if spec.crop_area < 1.0:
        other = "before_resize" if spec.crop_order == "after_resize" else "after_resize"
        add(f"crop {other}", dataclasses.replace(spec, crop_order=other))
    orders = itertools.permutations(spec.cameras) if 1 < len(spec.cameras) <= 3 else []
    for order in orders:
        if order != spec.cameras:
            add(f"cameras {', '.join(order)}", dataclasses.replace(spec, cameras=order))
    n, shift = len(observations), max(1, len(observations) // 2)
    others = _other_instructions([observation.instruction for observation in observations])
    add(
        "images of other frames",
        change=lambda i: dataclasses.replace(observations[i], images=observations[(i + shift) % n].images),
    )
    if others is not None:
        add("other instructions", change=lambda i: dataclasses.replace(observations[i], instruction=others[i]))
    return found


@dataclass(frozen=True)
class Variant:
    """One observation as a counterfactual policy would read it."""

    observation: Observation
    image: ImageSpec


@torch.no_grad()
def predict(
    policy: LocalPolicy, reader: LeRobotReader, n_frames: int, unnorm_key: str,
    on_frames: Callable[[int], None] = lambda n: None,
) -> Predictions:  # fmt: skip
    """Ask the policy about `n_frames` frames spread evenly over the data, in every variant.

    Args:
        unnorm_key: whose statistics turn its tokens into actions.
        on_frames: called after each batch of one variant with the number of frames in it.
    """
    cameras = policy.spec.image.cameras
    dataset = ChunkDataset([(reader.name, reader)], policy.spec.action.horizon, cameras)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(n_frames, len(dataset))).round().astype(int))
    show_history(dataset, policy.spec)
    samples = [dataset[int(i)] for i in chosen]
    observations = [observation_of(s) for s in samples]
    truth, valid = np.stack([s.actions for s in samples]), np.stack([~s.is_pad for s in samples])
    truth_ids = policy.action_token_ids(truth, reader.name if reader.name in policy.statistics else unnorm_key)
    valid_tokens = policy.codec.token_mask(truth_ids.numpy(), valid)
    weights = torch.from_numpy(valid_tokens)
    losses, teacher_ids = {}, None
    own = {"own": lambda i: Variant(observations[i], policy.spec.image)}
    for name, variant in {**own, **variants(policy, observations)}.items():
        rows, ids = _teacher_force(policy, [variant(i) for i in range(len(samples))], truth_ids, weights, on_frames)
        losses[name] = rows
        teacher_ids = ids if teacher_ids is None else teacher_ids
    chunks = []
    for start in range(0, len(observations), BATCH):
        chunks += policy.act(
            [dataclasses.replace(o, key=(0, i)) for i, o in enumerate(observations)][start : start + BATCH]
        )
        on_frames(len(observations[start : start + BATCH]))
    assert teacher_ids is not None
    free_ids = padded([chunk.token_ids for chunk in chunks if chunk.token_ids is not None])
    normalized, ok = policy.codec.decode(free_ids)
    predicted = policy.normalizer_of(unnorm_key).unnormalize(normalized)
    return Predictions(
        policy.spec.action.names, truth, valid, predicted, ok, truth_ids.numpy(), teacher_ids,
        _of_width(free_ids, truth_ids.shape[1]), losses,
        {camera: float(np.mean([s.images[camera].mean() for s in samples])) for camera in cameras}, valid_tokens,
    )  # fmt: skip


def n_passes(policy: LocalPolicy) -> int:
    """About how many times `predict` asks about each frame, for a progress bar."""
    blank = Observation({c: np.zeros((1, 1, 3), np.uint8) for c in policy.spec.image.cameras}, None, "a")
    return len(variants(policy, [blank])) + 2


def _teacher_force(
    policy: LocalPolicy,
    rows: list[Variant],
    truth_ids: torch.Tensor,
    weights: torch.Tensor,
    on_frames: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """(float64 (B,) mean loss over valid tokens and legal ids, int64 (B, T) best ids)."""
    losses, best = [], []
    legal = policy.legal_ids.to(policy.backbone.device)
    for start in range(0, len(rows), BATCH):
        part, ids = rows[start : start + BATCH], truth_ids[start : start + BATCH].to(policy.backbone.device)
        prompts = [prepare_prompt(row.observation, policy.spec.prompt) for row in part]
        inputs = policy.backbone.encode(prompts, [prepare_images(row.observation, row.image) for row in part])
        logits = policy.backbone.action_logits(inputs, ids)[..., legal].float()  # (B, T, n_symbols)
        open_ = policy.legal_mask(ids)
        logits = logits if open_ is None else logits.masked_fill(~open_, float("-inf"))
        targets = torch.searchsorted(legal, ids.clamp(min=int(legal[0])))
        token_losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        valid = weights[start : start + BATCH].to(ids.device)
        token_losses = (token_losses.view_as(ids) * valid).sum(1) / valid.sum(1).clamp(min=1)
        losses.append(token_losses.double().cpu().numpy())
        best.append(legal[logits.argmax(-1)].cpu().numpy())
        on_frames(len(part))
    return np.concatenate(losses), np.concatenate(best)


def _of_width(ids: np.ndarray, width: int) -> np.ndarray:
    """Ids (B, T) -> (B, width), cut or padded with -1."""
    return np.pad(ids, ((0, 0), (0, max(0, width - ids.shape[1]))), constant_values=PAD)[:, :width]


def _resizes(observations: Sequence[Observation], spec: ImageSpec) -> bool:
    sizes = {observation.images[camera].shape[:2] for observation in observations for camera in spec.cameras}
    return spec.crop_area < 1.0 or sizes != {(spec.size_px, spec.size_px)}


def _other_instructions(instructions: list[str]) -> list[str] | None:
    """For each row another instruction that occurs; None if there is only one."""
    known = list(dict.fromkeys(instructions))
    if len(known) < 2:
        return None
    return [known[(known.index(text) + 1) % len(known)] for text in instructions]
