"""What `vla finetune` starts from: its datasets, their statistics and a new policy."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import numpy as np

from vla.adapters import parameter_counts
from vla.finetune.data.agreement import check_agreement, common_cameras, doubts, gripper_index
from vla.finetune.data.chunks import ChunkDataset, Sample, holdout_split
from vla.finetune.data.open_source import open_sources
from vla.finetune.data.statistics import constant_warnings, dataset_statistics
from vla.finetune.data.subset_source import without_padding
from vla.finetune.formats.source import FrameSource
from vla.finetune.run_folder import data_revisions
from vla.finetune.sft_continue import OPENVLA_TOKENS, continued_policy, policy_on_lora
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_start import acting_key, check_data, joined_statistics, read_start
from vla.finetune.tokenizer_fit import action_tokenizer, normalized_chunks, takes_physical_units
from vla.import_policy import V01_TEMPLATE
from vla.libero_protocol import action_fields, get_protocol, image_spec
from vla.new_policy import create_policy
from vla.normalize import gripper_to_robot
from vla.number_tokens import place_numbers
from vla.openvla.config import OpenVlaConfig
from vla.policy import LocalPolicy
from vla.spec import TOKENIZER_FOLDER, ActionSpec, BackboneSpec, HeadSpec, ImageSpec, PolicySpec, PromptSpec
from vla.tokenizers.placement import Placement
from vla.tokenizers.schemes import load_tokenizer
from vla.types import Observation, problem

FROZEN_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""By precision: weights that do not train."""


def observation_of(sample: Sample) -> Observation:
    return Observation(
        sample.images, sample.state, sample.instruction, past_actions=sample.past_actions, motion=sample.motion
    )


def show_history(dataset: ChunkDataset, spec: PolicySpec) -> None:
    """Let the samples have the past actions that the policy is shown, turned as its actions are on their way to the robot."""
    a = spec.action
    given = functools.partial(
        gripper_to_robot, dim=a.gripper_dim, gripper_range=a.gripper_range, threshold=a.gripper_threshold,
        invert=a.gripper_invert,
    )  # fmt: skip
    dataset.show_past_actions(spec.prompt.history, given)


def open_datasets(settings: Settings) -> tuple[ChunkDataset, dict[str, Any]]:
    """The training samples, and each dataset's statistics."""
    if not settings.data:
        raise problem("no dataset", "at least one dataset folder, file or address", "pass --data FOLDER")
    revisions = data_revisions(settings.out) if settings.resume else None
    sources, weights = open_sources(settings.data, settings.weights, settings.skip_bad, revisions)
    far = [source.where for source in sources if source.in_order]
    if far and not settings.shuffle_window:
        raise problem(f"{far[0]} with only some of its files on the disk, and a shuffle over all of it",
                      "frames that are read file by file", "pass --shuffle-window 20000 --no-cache-images")  # fmt: skip
    if settings.proprio:
        sources = [without_padding(source) for source in sources]
    check_agreement(sources, settings.state or settings.proprio)
    gripper = None if takes_physical_units(settings.tokenizer) else gripper_index(settings.gripper_dim, sources)
    dataset = ChunkDataset(
        [(source.name, source) for source in sources], settings.horizon, settings.cameras or common_cameras(sources), weights,
        seed=settings.seed, holdout_episodes=settings.holdout_episodes, cache_images=settings.cache_images,
        balance=weights is not None, skip_unlabelled=True, skip_bad=settings.skip_bad, window=settings.shuffle_window,
    )  # fmt: skip
    statistics = {source.name: dataset_statistics(source, gripper_dim=gripper) for source in sources}
    if takes_physical_units(settings.tokenizer):
        for entry in statistics.values():
            entry["action"]["mask"] = [False] * sources[0].action_dim
    for line in [*doubts(sources, gripper, settings.state or settings.proprio), *constant_warnings(statistics)]:
        print(f"warning: {line}", file=sys.stderr)
    return dataset, statistics


def build_policy(
    settings: Settings, dataset: ChunkDataset, statistics: dict[str, Any], device: str, sharded: bool = False
) -> LocalPolicy:
    """The backbone with action tokens and a fresh adapter, or whatever `settings.from_` goes on with.

    Args:
        sharded: all weights are float32 whatever the precision: FSDP2 shards weights of one type only.
    """
    reader, start = dataset.readers[0], read_start(settings)
    check_data(start, reader, statistics[reader.name])
    statistics = joined_statistics(settings, start, statistics, dataset.readers)
    key = acting_key(settings, statistics, dataset.readers)
    dtype = "float32" if sharded else FROZEN_DTYPES[settings.precision]
    if start.spec is not None and start.folder is not None:
        return continued_policy(settings, start.spec, start.folder, statistics, key, reader.fps, device, dtype)
    names = tuple(reader.action_names)
    mask = statistics[reader.name]["action"].get("mask", [True] * len(names))  # the same for every dataset
    gripper = mask.index(False) if mask.count(False) == 1 else None  # a scheme of recorded numbers normalises none
    convention = settings.gripper_convention or reader.gripper
    action = ActionSpec(
        names, settings.horizon, settings.delta, gripper, convention, control_hz=reader.fps, normalization=settings.normalization
    )  # fmt: skip
    if settings.protocol and gripper is not None and min(s.actions()[:, gripper].min() for s in dataset.readers) >= 0:
        # The protocol's gripper is that of data whose gripper runs from 0 to 1; -1 to 1 is LIBERO's own.
        action = dataclasses.replace(action, **action_fields(get_protocol(settings.protocol)))

    def chunks() -> np.ndarray:
        held = [holdout_split(r.n_episodes, settings.holdout_episodes, settings.seed) for r in dataset.readers]
        return normalized_chunks(
            dataset.sources, statistics, settings.horizon, held, normalization=settings.normalization
        )

    kept = settings.out / TOKENIZER_FOLDER  # a run that goes on does so with the tokenizer it began with
    again = settings.resume and kept.is_dir()
    tokenizer = load_tokenizer(kept) if again else action_tokenizer(settings.tokenizer, settings.bins, chunks)
    image, head = image_path(settings, dataset.cameras, start.openvla), _head(settings, dataset.readers)
    prompt = _prompt(settings, dataset.readers, statistics, action)
    if start.openvla is not None:
        print(f"{settings.backbone} is an OpenVLA: its prompt, pictures of {image.size_px} px by {image.resize_filter}, "
              "and, unless --placement says otherwise, its own action ids")  # fmt: skip
    if start.kind == "adapter" and start.folder is not None:
        _, prompt = place_numbers(prompt, Placement.load(OPENVLA_TOKENS.placement), OPENVLA_TOKENS.n_symbols)
        spec = PolicySpec(
            settings.out.name, BackboneSpec(settings.backbone), action, image, prompt, OPENVLA_TOKENS, key
        )
        return policy_on_lora(spec, start.folder, statistics, tokenizer, device, dtype)
    placement = settings.placement
    if placement == "auto":
        placement = "tail" if start.openvla else "added"
    return create_policy(
        settings.backbone, name=settings.out.name, action=action, image=image, prompt=prompt, statistics=statistics,
        placement=placement, tokenizer=tokenizer, skip=settings.placement_skip, added_init=settings.added_init, unnorm_key=key,
        lora_r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        lora_parts=settings.lora_parts, lora_init=settings.lora_init, method=settings.method, device=device, dtype=dtype, head=head,
    )  # fmt: skip


def _head(settings: Settings, sources: list[FrameSource]) -> HeadSpec | None:
    """VlaError for a state as a token from data without one."""
    if settings.head == "tokens":
        return None
    without = [source.name for source in sources if settings.proprio and source.states() is None]
    if without:
        raise problem(f"--proprio with {', '.join(without)}, which has no state", "data with a state", "drop --proprio")
    return HeadSpec(settings.head, tuple(sources[0].state_names) if settings.proprio else (), settings.film)


def image_path(settings: Settings, cameras: tuple[str, ...], openvla: OpenVlaConfig | None = None) -> ImageSpec:
    """What happens to a frame, by the protocol or by the single settings; in an OpenVLA as its authors train: resized by
    lanczos3, then cropped.

    Raises:
        VlaError: unknown protocol, a setting that contradicts it, or random crops that it has no centre crop for; for an
            OpenVLA, more cameras than it sees or another size than it has.
    """
    size = openvla.image_sizes[0] if openvla is not None else 224
    if openvla is not None and len(cameras) > 1 and settings.head == "tokens":
        raise problem(
            f"cameras {', '.join(cameras)} for an OpenVLA", "one: it sees one picture", f"pass --cameras {cameras[0]}"
        )
    if openvla is not None and settings.image_size_px not in (0, size):
        raise problem(
            f"image_size_px {settings.image_size_px} for an OpenVLA of {size} px", f"{size}", "drop --image-size-px"
        )
    if not settings.protocol:
        size_px = settings.image_size_px or (160 if settings.backbone == "tiny" else size)
        image = ImageSpec(cameras, size_px, crop_area=settings.crop_area, rotation_deg=settings.rotation_deg)
        if openvla is None:
            return image
        order = "after_resize" if settings.crop_area < 1.0 else "before_resize"
        return dataclasses.replace(image, resize_filter="lanczos3", crop_order=order)
    protocol = get_protocol(settings.protocol)
    image = image_spec(protocol, cameras, random_crops=settings.augment, frames_turned=settings.frames_turned)
    if settings.augment and image.crop_area == 1.0:
        raise problem(f"--augment with protocol {protocol.name}", "a protocol with a centre crop, which stands for the random "
                      "crops when acting", "drop one of them")  # fmt: skip
    for name, neutral in (("crop_area", 1.0), ("rotation_deg", 0)):
        got, wanted = getattr(settings, name), getattr(image, name)
        if got not in (neutral, wanted):
            raise problem(
                f"{name} {got} with protocol {protocol.name}", f"{wanted}, as the protocol has", f"drop {name}"
            )
    if openvla is not None and image.size_px != size:
        raise problem(
            f"protocol {protocol.name} with {image.size_px} px", f"{size} px, as the OpenVLA has", "drop --protocol"
        )
    return dataclasses.replace(image, size_px=settings.image_size_px or image.size_px)


def _prompt(
    settings: Settings, sources: list[FrameSource], statistics: dict[str, Any], action: ActionSpec
) -> PromptSpec:
    """What is shown besides the instruction, and between which bounds."""
    found = [states for source in sources if (states := source.states()) is not None] if settings.state else []
    shown: dict[str, Any] = {}
    words = V01_TEMPLATE if "v01" in settings.backbone else PromptSpec.template
    if found:
        low = settings.state_low or tuple(float(x) for x in np.min([states.min(0) for states in found], axis=0))
        high = settings.state_high or tuple(float(x) for x in np.max([states.max(0) for states in found], axis=0))
        names = tuple(sources[0].state_names)
        shown = {
            "state_names": names,
            "state_low": low,
            "state_high": high,
            "state_optional": settings.state_dropout > 0,
        }
        words = "State: {state}. " + words
    if settings.history:
        low, high = _history_bounds([statistics[source.name]["action"] for source in sources], action)
        shown |= {"history": settings.history, "history_low": low, "history_high": high}
        shown |= {"history_optional": settings.history_dropout > 0}
        words = "Past actions: {history}. " + words
    if shown:
        shown["numbers_as"] = settings.numbers_as
    return PromptSpec(settings.template or words, True, **shown)


def _history_bounds(entries: list[dict[str, Any]], action: ActionSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per dimension, the values beyond which past actions look alike: q01 and q99 where actions are normalised by them, else
    the extremes; of a gripper that is turned on its way to the robot, what the robot can be given."""
    bounds = []
    for name, extreme, least in (("q01", "min", np.min), ("q99", "max", np.max)):
        key = name if action.normalization == "bounds_q99" else extreme
        rows = [np.where(e.get("mask", [True] * action.dim), e[key], e[extreme]) for e in entries]
        bounds.append(least(rows, axis=0).astype(float).tolist())
    low, high = bounds
    turned = (action.gripper_range, action.gripper_threshold, action.gripper_invert) != ("signed", None, False)
    if action.gripper_dim is not None and turned:
        low[action.gripper_dim], high[action.gripper_dim] = -1.0, 1.0
    return tuple(low), tuple(high)


def describe(settings: Settings, dataset: ChunkDataset, policy: LocalPolicy) -> None:
    """Print what a run would train on and what it would train."""
    trainable_count, total = parameter_counts(policy.backbone.model)
    for name, value in dataclasses.asdict(settings).items():
        print(f"  {name} = {value}")
    sample = dataset[int(dataset.indices(0, 1)[0])]
    ids = policy.action_token_ids(sample.actions[None], sample.dataset)
    for name, source in dataset.sources:
        print(f"  {name}: {source.n_episodes} episodes, {len(source)} frames of {source.where}")
    print(f"data: {len(dataset)} chunks to train on, {len(dataset.holdout_indices)} held out, "
          f"{dataset.n_unlabelled} episodes without an instruction left out")  # fmt: skip
    print(f"parameters: {total:,}, of which {trainable_count:,} train ({trainable_count / total:.1%})")
    inputs = policy.encode([observation_of(sample)])
    print("prompt:", policy.backbone.processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True))
    print("action ids:", ids[0].tolist())
    print("decoded:", policy.normalizer.unnormalize(policy.codec.decode(ids.numpy())[0])[0].round(3).tolist())
