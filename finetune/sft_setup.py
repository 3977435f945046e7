"""What `vla finetune` starts from: its datasets, their statistics and a new policy."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np

from vla.adapters import parameter_counts
from vla.finetune.data.agreement import check_agreement, common_cameras, doubts, gripper_index
from vla.finetune.data.chunks import ChunkDataset, Sample, holdout_split
from vla.finetune.data.open_source import open_sources
from vla.finetune.data.statistics import constant_warnings, dataset_statistics
from vla.finetune.formats.source import FrameSource
from vla.finetune.sft_settings import Settings
from vla.finetune.tokenizer_fit import action_tokenizer, normalized_chunks, takes_physical_units
from vla.libero_protocol import action_fields, get_protocol, image_spec
from vla.policy import LocalPolicy, create_policy
from vla.spec import TOKENIZER_FOLDER, ActionSpec, ImageSpec, PromptSpec
from vla.tokenizers.schemes import load_tokenizer
from vla.types import Observation, problem

FROZEN_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""By precision: weights that do not train."""


def observation_of(sample: Sample) -> Observation:
    return Observation(sample.images, sample.state, sample.instruction)


def open_datasets(settings: Settings) -> tuple[ChunkDataset, dict[str, Any]]:
    """The training samples, and each dataset's statistics."""
    if not settings.data:
        raise problem("no dataset", "at least one dataset folder, file or address", "pass --data FOLDER")
    sources, weights = open_sources(settings.data, settings.weights, settings.skip_bad)
    check_agreement(sources, settings.state)
    gripper = None if takes_physical_units(settings.tokenizer) else gripper_index(settings.gripper_dim, sources)
    dataset = ChunkDataset(
        [(source.name, source) for source in sources], settings.horizon, settings.cameras or common_cameras(sources), weights,
        seed=settings.seed, holdout_episodes=settings.holdout_episodes, cache_images=settings.cache_images,
        balance=weights is not None, skip_unlabelled=True, skip_bad=settings.skip_bad,
    )  # fmt: skip
    statistics = {source.name: dataset_statistics(source, gripper_dim=gripper) for source in sources}
    if takes_physical_units(settings.tokenizer):
        for entry in statistics.values():
            entry["action"]["mask"] = [False] * sources[0].action_dim
    for line in [*doubts(sources, gripper, settings.state), *constant_warnings(statistics)]:
        print(f"warning: {line}", file=sys.stderr)
    return dataset, statistics


def build_policy(
    settings: Settings, dataset: ChunkDataset, statistics: dict[str, Any], device: str, sharded: bool = False
) -> LocalPolicy:
    """The backbone with action tokens and a fresh adapter.

    Args:
        sharded: all weights are float32 whatever the precision: FSDP2 shards weights of one type only.
    """
    reader = dataset.readers[0]
    names = tuple(reader.action_names)
    mask = statistics[dataset.sources[0][0]]["action"]["mask"]  # the same for every dataset
    gripper = mask.index(False) if mask.count(False) == 1 else None  # a scheme of recorded numbers normalises none
    convention = settings.gripper_convention or reader.gripper
    action = ActionSpec(names, settings.horizon, settings.delta, gripper, convention, control_hz=reader.fps)
    if settings.protocol and gripper is not None and min(s.actions()[:, gripper].min() for s in dataset.readers) >= 0:
        # The protocol's gripper is that of data whose gripper runs from 0 to 1; -1 to 1 is LIBERO's own.
        action = dataclasses.replace(action, **action_fields(get_protocol(settings.protocol)))
    keys = sorted(statistics)

    def chunks() -> np.ndarray:
        held = [holdout_split(r.n_episodes, settings.holdout_episodes, settings.seed) for r in dataset.readers]
        return normalized_chunks(dataset.sources, statistics, settings.horizon, held)

    kept = settings.out / TOKENIZER_FOLDER  # a run that goes on does so with the tokenizer it began with
    again = settings.resume and kept.is_dir()
    tokenizer = load_tokenizer(kept) if again else action_tokenizer(settings.tokenizer, settings.bins, chunks)
    return create_policy(
        settings.backbone, name=settings.out.name, action=action, image=image_path(settings, dataset.cameras),
        prompt=_prompt(settings, dataset.readers), statistics=statistics, placement=settings.placement,
        tokenizer=tokenizer, skip=settings.placement_skip,
        added_init=settings.added_init, unnorm_key=keys[0] if len(keys) == 1 else None,
        lora_r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        lora_parts=settings.lora_parts, method=settings.method, device=device,
        dtype="float32" if sharded else FROZEN_DTYPES[settings.precision],
    )  # fmt: skip


def image_path(settings: Settings, cameras: tuple[str, ...]) -> ImageSpec:
    """What happens to a frame, by the protocol or by the single settings.

    Raises:
        VlaError: unknown protocol, a setting that contradicts it, or random crops that it has no centre crop for.
    """
    if not settings.protocol:
        size_px = settings.image_size_px or (160 if settings.backbone == "tiny" else 224)
        return ImageSpec(cameras, size_px, crop_area=settings.crop_area, rotation_deg=settings.rotation_deg)
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
    return dataclasses.replace(image, size_px=settings.image_size_px or image.size_px)


def _prompt(settings: Settings, sources: list[FrameSource]) -> PromptSpec:
    found = [states for source in sources if (states := source.states()) is not None] if settings.state else []
    if not found:
        return PromptSpec(settings.template or PromptSpec.template)
    low = settings.state_low or tuple(float(x) for x in np.min([states.min(0) for states in found], axis=0))
    high = settings.state_high or tuple(float(x) for x in np.max([states.max(0) for states in found], axis=0))
    template = settings.template or "State: {state}. In: What action should the robot take to {instruction}?\nOut:"
    return PromptSpec(
        template, True, tuple(sources[0].state_names), low, high, state_optional=settings.state_dropout > 0
    )


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
