"""What a run of `vla finetune` starts from: a checkpoint, a policy, or a LoRA of OpenVLA's own script.

| `--from` | tokens, prompt, pictures, chunks | statistics | weights that train |
| --- | --- | --- | --- |
| a policy directory with an adapter | the policy's | the policy's, and those of new data | its adapter |
| the same with merged weights, or none | the policy's | the same | a new adapter |
| a LoRA of OpenVLA's script | OpenVLA's, the settings' | of the data | that LoRA, on `backbone` |
| a checkpoint | as with `--backbone` | of the data | a new adapter |
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from vla.backbone import TINY
from vla.finetune.data.agreement import LAST
from vla.finetune.data.camera_map import policy_name
from vla.finetune.formats.source import FrameSource
from vla.finetune.sft_settings import Settings
from vla.hub_policy import HTTP_ERROR, PREFIX, explained, names_repository, policy_folder
from vla.libero_protocol import get_protocol, image_spec
from vla.normalize import ActionNormalizer, Statistics, action_normalizer, choose_key
from vla.openvla.checkpoint import local_folder, read_config
from vla.openvla.checkpoint import read_statistics as checkpoint_statistics
from vla.openvla.config import OpenVlaConfig
from vla.policy_files import STATISTICS_FILE, read_statistics
from vla.spec import FILE, TOKENIZER_FOLDER, ImageSpec, PolicySpec, read_spec
from vla.types import problem

ADAPTER_CONFIG = "adapter_config.json"
Kind = Literal["checkpoint", "adapter", "policy"]
MARKS: dict[Kind, str] = {"policy": FILE, "adapter": ADAPTER_CONFIG}
"""The file by which each is known; a checkpoint is what has neither."""
TOLD = (
    "method", "lora_r", "lora_alpha", "lora_dropout", "horizon", "head", "state", "proprio", "history", "numbers_as", "crop_area",
    "rotation_deg", "delta", "normalization", "stop_token", "backbone",
    "language_motion", "motion_lookahead", "motion_threshold", "motion_words",
)  # fmt: skip
"""Settings whose change is said; the others are names and paths."""
CLIPPED = 0.2
"""Share of actions outside given statistics from which on they are doubted; of their own, 2 % are."""


@dataclass(frozen=True)
class Start:
    """See the module."""

    kind: Kind = "checkpoint"
    folder: Path | None = None
    """Of the policy or the LoRA."""
    spec: PolicySpec | None = None
    """Of the policy."""
    openvla: OpenVlaConfig | None = None
    """Of the backbone, where it is an OpenVLA; not of a policy's."""
    statistics: Statistics = dataclasses.field(default_factory=dict)
    """That the source comes with."""


def read_start(settings: Settings) -> Start:
    """What `from_`, or else `backbone`, is; no weights are read.

    Raises:
        VlaError: an OpenVLA-OFT checkpoint, a LoRA without its OpenVLA, or a damaged policy directory.
    """
    kind = source_kind(settings.from_) if settings.from_ else "checkpoint"
    if kind == "policy":
        folder = policy_folder(settings.from_)
        return Start("policy", folder, read_spec(folder), statistics=read_statistics(folder / STATISTICS_FILE))
    adapter = policy_folder(settings.from_) if kind == "adapter" else None
    source = settings.backbone if adapter is not None or not settings.from_ else settings.from_
    folder, config = _openvla(source)
    if adapter is not None and settings.head != "tokens":
        raise problem(f"head {settings.head!r} with a LoRA of OpenVLA's script", "a LoRA that answers in tokens",
                      "import it with its head (`vla import`), and start from that policy")  # fmt: skip
    if adapter is not None and config is None:
        raise problem(f"the LoRA {settings.from_} with backbone {source!r}, which is no OpenVLA or cannot be had now",
                      "the OpenVLA it was trained on", "pass --backbone openvla/openvla-7b, or the folder of that checkpoint")  # fmt: skip
    if config is None or folder is None:
        return Start()
    statistics = _beside(adapter) or checkpoint_statistics(folder, config)
    return Start(kind, adapter, openvla=config, statistics=statistics)


def started(settings: Settings) -> Settings:
    """The settings as the source of the run decides them; what changes is said.

    Raises:
        VlaError: settings that the source cannot follow.
    """
    if not settings.from_:
        return settings
    start = read_start(settings)
    if start.kind == "checkpoint":
        return dataclasses.replace(settings, backbone=settings.from_)
    changes = _of_adapter(settings, start) | (
        _of_policy(settings, start.spec, start.folder) if start.spec and start.folder else {}
    )
    told = [f"{name} {value!r}" for name, value in changes.items() if name in TOLD and getattr(settings, name) != value]
    if told:
        print(f"as in {settings.from_}: {', '.join(told)}")
    return dataclasses.replace(settings, **changes)


def joined_statistics(settings: Settings, start: Start, new: Statistics, sources: list[FrameSource]) -> Statistics:
    """Statistics of the policy that is made: of the data and, if a policy goes on, its own.

    Data that the policy knows by name, and all data where `unnorm_key` is one of the source's, keep the source's: tokens
    then mean the same motions as before.

    Raises:
        VlaError: an unknown key (the known ones are listed), or statistics of another robot.
    """
    key, old, policy = settings.unnorm_key or None, start.statistics, start.kind == "policy"
    if key is not None:
        choose_key({**old, **new}, key)
    found = dict(old) if policy else {key: old[key]} if key in old else {}
    for source in sources:
        name = source.name
        kept = key if key in old else name if policy and name in old else None
        found[name] = new[name] if kept is None else old[kept]
        if kept is not None:
            normalization = start.spec.action.normalization if start.spec else settings.normalization
            _doubt(settings, source, action_normalizer(old, kept, source.action_dim, normalization), kept)
    return found


def check_data(start: Start, source: FrameSource, entry: dict[str, Any]) -> None:
    """VlaError unless the data's actions and states fit the policy that goes on."""
    if start.spec is None:
        return
    action, states = start.spec.action, start.spec.state_names
    if source.action_dim != action.dim:
        raise problem(f"{source.name} with {source.action_dim} action dimensions ({', '.join(source.action_names)})",
                      f"{action.dim}, as the policy has ({', '.join(action.names)})",
                      "a policy goes on with data of the same robot; for another, start from its backbone")  # fmt: skip
    mask = entry["action"]["mask"]
    gripper = mask.index(False) if mask.count(False) == 1 else None
    if action.gripper_dim is not None and gripper != action.gripper_dim:
        raise problem(f"{source.name} with " + ("no gripper within [-1, 1]" if gripper is None else f"the gripper at {gripper}"),
                      f"one at {action.gripper_dim}, as the policy has", "bring the data's actions into the policy's form")  # fmt: skip
    if action.gripper_dim is not None:
        low = source.actions()[:, action.gripper_dim].min()
        lows = [old["action"]["min"][action.gripper_dim] for old in start.statistics.values() if "min" in old["action"]]
        if low < 0 and (action.gripper_range == "unit" or min(lows, default=-1) >= 0):
            raise problem(f"{source.name} with a gripper of -1..1", "0..1, as the policy has", "bring the data's into that range")  # fmt: skip
        if low >= 0 > min(lows, default=0):
            print(f"warning: the gripper of {source.name} is never below 0, that of the policy's data is: is it 0..1 here and -1..1 there?",
                  file=sys.stderr)  # fmt: skip
    if states and source.state_dim != len(states):
        raise problem(f"{source.state_dim} state dimensions in {source.name}", f"{len(states)}, as the policy is shown: "
                      f"{', '.join(states)}", "a policy goes on with data of the same robot")  # fmt: skip
    if tuple(source.action_names) != action.names:
        print(f"warning: the actions of {source.name} are called {', '.join(source.action_names)}, those of the policy "
              f"{', '.join(action.names)}: they must mean the same", file=sys.stderr)  # fmt: skip


def acting_key(settings: Settings, statistics: Statistics, sources: list[FrameSource]) -> str | None:
    """Whose statistics the policy acts by; None: it must be said when the policy is used."""
    names = sorted({source.name for source in sources})
    return choose_key(statistics, settings.unnorm_key) if settings.unnorm_key else names[0] if len(names) == 1 else None


def _of_policy(settings: Settings, spec: PolicySpec, folder: Path) -> dict[str, Any]:
    """Settings that a policy decides."""
    if settings.augment and spec.image.crop_area == 1.0:
        raise problem("--augment with a policy that crops nothing when it acts", "one with a centre crop, which stands for "
                      "the random crops", "pass --no-augment")  # fmt: skip
    if settings.protocol and spec.image != _protocol_image(settings, spec):
        raise problem(f"protocol {settings.protocol} with --from a policy of other pictures", "the policy's own pictures and "
                      "gripper", "pass --protocol ''")  # fmt: skip
    named = tuple(policy_name(text) for text in settings.cameras)
    if settings.cameras and named != spec.image.cameras:
        raise problem(f"cameras {', '.join(named)}", f"{', '.join(spec.image.cameras)}, as the policy sees",
                      f"name the data's: {spec.image.cameras[0]}=KEY")  # fmt: skip
    gripper = (
        None if spec.action.gripper_dim is None else LAST if settings.gripper_dim is None else settings.gripper_dim
    )
    prompt, head, motion = spec.prompt, spec.head, spec.motion
    if motion is not None and settings.motion_template not in ("", motion.template):
        raise problem("--motion-template with --from a policy with language motions", "the policy's own motion query",
                      "drop --motion-template")  # fmt: skip
    motions = {} if motion is None else {  # unless the new data are to be read in another way
        "language_motion": True, "motion_lookahead": settings.motion_lookahead or motion.lookahead,
        "motion_threshold": motion.threshold if settings.motion_threshold == Settings.motion_threshold else settings.motion_threshold,
        "motion_words": settings.motion_words or motion.words,
    }  # fmt: skip
    tokenizer = str(folder / TOKENIZER_FOLDER) if (folder / TOKENIZER_FOLDER).is_dir() else spec.tokens.scheme
    if settings.tokenizer not in (Settings.tokenizer, spec.tokens.scheme, tokenizer):
        raise problem(f"tokenizer {settings.tokenizer} with --from a policy", f"{spec.tokens.scheme}, whose tokens it speaks",
                      "drop --tokenizer, or start from the policy's backbone")  # fmt: skip
    return {
        "cameras": settings.cameras or spec.image.cameras, "image_size_px": spec.image.size_px,
        "crop_area": spec.image.crop_area, "rotation_deg": spec.image.rotation_deg, "horizon": spec.action.horizon,
        "state": bool(prompt.state_names), "state_dropout": settings.state_dropout if prompt.state_optional else 0.0,
        "history": prompt.history, "history_dropout": settings.history_dropout if prompt.history_optional else 0.0,
        "numbers_as": prompt.numbers_as, "template": prompt.template, "gripper_dim": gripper, "delta": spec.action.delta,
        "head": head.kind if head else "tokens", "proprio": bool(head and head.state_names), "film": bool(head and head.film),
        "normalization": spec.action.normalization, "placement": "auto", "protocol": "", "frames_turned": False,
        "stop_token": settings.stop_token and head is None,
        "tokenizer": tokenizer, "backbone": spec.backbone.source, **motions,
    }  # fmt: skip


def _protocol_image(settings: Settings, spec: PolicySpec) -> ImageSpec:
    """The protocol's pictures, by the settings that vary them."""
    return image_spec(
        get_protocol(settings.protocol), spec.image.cameras, random_crops=settings.augment, frames_turned=settings.frames_turned
    )  # fmt: skip


def _of_adapter(settings: Settings, start: Start) -> dict[str, Any]:
    """Settings that an adapter decides which goes on."""
    spec, folder = start.spec, start.folder
    if folder is None or spec is not None and spec.backbone.weights != "adapter":
        return {}
    path = (folder if spec is None else folder / "adapter") / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        packed = spec is not None and spec.backbone.quantization == "nf4"
        marks = {"qlora": packed, "dora": config.get("use_dora"), "rslora": config.get("use_rslora")}
        method = next((name for name, marked in marks.items() if marked), "lora")
        values = {
            "lora_r": int(config["r"]),
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config["lora_dropout"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(f"{path}: {error}", "the configuration of a LoRA adapter", "restore the folder from a copy") from error  # fmt: skip
    if settings.method not in ("lora", method):
        raise problem(f"method {settings.method} with an adapter trained by {method}", f"{method}, or merged weights",
                      "drop --method, or `vla merge` the policy first and start from the result")  # fmt: skip
    return {"method": method, **values}


def _doubt(settings: Settings, source: FrameSource, normalizer: ActionNormalizer, key: str) -> None:
    """Say by whose statistics the data are normalised, and warn where they do not look like this robot's."""
    actions = source.actions()[:, normalizer.mask]
    low, high = normalizer.q01[normalizer.mask], normalizer.q99[normalizer.mask]
    outside = float(np.mean((actions < low) | (actions > high))) if actions.size else 0.0
    print(f"{source.name} is normalised by the statistics of {key!r} of {settings.from_ or settings.backbone}")
    if outside > CLIPPED:
        print(f"warning: {outside:.0%} of its actions lie outside them and are clipped: is it another robot, or another unit?",
              file=sys.stderr)  # fmt: skip


def source_kind(source: str) -> Kind:
    """What a folder, or a Hub repository of which only this is asked for, holds."""
    if names_repository(source):
        return _kind_on_hub(source)
    for kind, file in MARKS.items():
        if (Path(source) / file).is_file():
            return kind
    return "checkpoint"


@functools.cache
def _kind_on_hub(source: str) -> Kind:
    repo, _, revision = source.removeprefix(PREFIX).partition("@")
    for kind, file in MARKS.items():
        try:
            hf_hub_download(repo, file, revision=revision or None)
            return kind
        except LocalEntryNotFoundError:  # the Hub cannot be reached; a checkpoint may be in the cache
            break
        except EntryNotFoundError:
            continue
        except (HTTP_ERROR, OSError, ValueError) as error:
            raise explained(error, f"{repo}@{revision or 'main'}", "a policy directory or a checkpoint") from error
    return "checkpoint"


def _openvla(source: str) -> tuple[Path | None, OpenVlaConfig | None]:
    """Folder and config of an OpenVLA; Nones for any other backbone. What cannot be opened is left to `load_backbone`."""
    if source == TINY:
        return None, None
    try:
        if PreTrainedConfig.get_config_dict(source)[0].get("model_type") != "openvla":
            return None, None
    except (OSError, ValueError):
        return None, None
    folder = local_folder(source, None)
    heads = sorted(path.name for path in folder.glob("action_head--*"))
    if heads:
        raise problem(f"{source} with {heads[0]}, an OpenVLA-OFT checkpoint", "a policy directory, which holds its head too",
                      f"vla import {source} --out POLICY, and start --from POLICY")  # fmt: skip
    return folder, read_config(folder)


def _beside(adapter: Path | None) -> Statistics:
    """dataset_statistics.json beside a LoRA; the authors' script writes it beside the merged weights only."""
    path = None if adapter is None else adapter / STATISTICS_FILE
    return read_statistics(path) if path is not None and path.is_file() else {}
