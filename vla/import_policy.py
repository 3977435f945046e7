"""`vla import`: a policy directory of ours from an OpenVLA or OpenVLA-OFT checkpoint, or from a LoRA of the authors' scripts.

    vla import openvla/openvla-7b --out runs/openvla --unnorm-key bridge_orig
    vla import openvla/openvla-7b-finetuned-libero-spatial --out runs/spatial --unnorm-key libero_spatial --protocol openvla
    vla import openvla/openvla-7b --adapter adapter-tmp/my-run --statistics runs/my-run/dataset_statistics.json --out runs/mine
    vla import moojink/openvla-7b-oft-finetuned-libero-spatial --protocol oft --out runs/oft
    vla import openvla/openvla-7b --adapter runs/my-run--50000_chkpt/lora_adapter --out runs/oft

The weights are checked by name and shape and stay where they are, unless `--copy`. What the authors keep in code or in
their readers' heads (statistics, prompt, action ids, image path, gripper, and of OpenVLA-OFT the length of chunks and what
normalises the state) is written into policy.json. The heads of OpenVLA-OFT are read from its .pt files, unpickling nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from vla.backbone import DTYPES, fingerprint, load_backbone
from vla.hub_policy import HTTP_ERROR, explained
from vla.libero_protocol import action_fields, get_protocol, image_spec
from vla.normalize import Statistics, action_normalizer, choose_key
from vla.openvla.adapter import attach_adapter
from vla.openvla.checkpoint import STATISTICS_FILE, local_folder, read_config, read_statistics
from vla.openvla.config import OpenVlaConfig
from vla.openvla.film_file import load_vision_backbone
from vla.openvla.oft_import import (
    ADAPTER_FOLDER,
    PATTERNS,
    Kind,
    OftFiles,
    Platform,
    find_files,
    head_kind,
    lora_alone,
    platform_of,
    read_heads,
)
from vla.openvla.oft_model import attach, inner
from vla.policy import LocalPolicy
from vla.spec import ActionSpec, BackboneSpec, HeadSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec
from vla.tokenizers.placement import Placement
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import problem

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""Of the seven-dimensional actions of OpenVLA's data."""
V01_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)


@dataclass(frozen=True)
class Settings:
    """Settings of `vla import`."""

    source: tyro.conf.Positional[str]
    """OpenVLA checkpoint: a folder, or owner/name on the Hub."""
    out: Path
    """Policy directory to write; must not exist."""
    unnorm_key: str | None = None
    """Dataset whose statistics give actions their units. Needed when there are several."""
    adapter: Path | None = None
    """Folder of a LoRA adapter that OpenVLA's finetune.py saved (adapter_config.json, adapter_model.safetensors)."""
    statistics: Path | None = None
    """dataset_statistics.json to use. Else the one beside the adapter, the one beside the weights, config.json's."""
    protocol: str | None = None
    """openvla: frames, crop and gripper as its authors evaluate on LIBERO. Not given: the frame as it is, resized."""
    random_crops: bool = True
    """With --protocol: the policy was trained with random crops, so frames are centre-cropped."""
    cameras: tuple[str, ...] = ()
    """Cameras shown to the policy, in order; one, or as many as an OpenVLA-OFT was trained with. Default: agentview with
    --protocol, image without; for OpenVLA-OFT its platform's: with a wrist camera on LIBERO, with two on ALOHA."""
    head: Kind = "auto"
    """What the actions come from: tokens, l1 or discrete. auto: l1 with a file action_head--*, discrete with a projector or FiLM
    and no such file, else tokens; an OpenVLA-OFT with discrete tokens, one image and no state must be named."""
    heads: Path | None = None
    """Folder of OpenVLA-OFT's files action_head--*, proprio_projector--*, vision_backbone--*. Default: the one above the adapter,
    or the source."""
    platform: Literal["auto", "libero", "aloha", "bridge"] = "auto"
    """Whose constants an OpenVLA-OFT has: libero 8 actions per chunk, aloha 25 and bounds that are minimum and maximum, bridge 5.
    auto: by the sizes of action and state."""
    horizon: int = 0
    """Actions per chunk of an OpenVLA-OFT; 0: the platform's."""
    revision: str | None = None
    """Branch, tag or commit of a Hub source; the commit is stored."""
    copy: bool = False
    """Write the weights into the policy directory too."""
    dtype: str = "bfloat16"
    """Data type the weights are opened in, and written in with --copy: float32, bfloat16 or float16."""


def run(settings: Settings) -> Path:
    """Check and write; returns `out`."""
    if settings.out.exists():
        raise problem(f"{settings.out} exists", "a new folder", "choose another --out, or delete it")
    if settings.dtype not in DTYPES:
        raise problem(f"dtype {settings.dtype!r}", f"one of {', '.join(DTYPES)}", "correct --dtype")
    folder = local_folder(settings.source, settings.revision)
    is_folder = Path(settings.source).is_dir()
    files = _oft_files(settings, folder)
    kind = head_kind(files, settings.head, str(_heads_folder(settings, folder)))
    config = read_config(folder)
    statistics = _statistics(settings, folder, config)
    key = choose_key(statistics, settings.unnorm_key)
    platform = _platform(settings, statistics, key) if kind else None
    action, image = _action(settings, statistics, key, platform), _image(settings, config, platform)
    backbone = load_backbone(str(folder), dtype=settings.dtype)
    tokenizer = UniformTokenizer(config.n_action_bins)
    placement = _placement(config, backbone.processor.tokenizer)
    base = BackboneSpec(
        str(folder.resolve()) if is_folder else settings.source, "openvla", "base",
        None if is_folder else folder.name, fingerprint(backbone.model),
    )  # fmt: skip
    copied = settings.copy or files.vision is not None  # FiLM's file holds all of the vision backbone
    if files.vision is not None:
        load_vision_backbone(backbone.model, files.vision)
    if settings.adapter is not None:
        backbone.model = attach_adapter(backbone.model, settings.adapter)
        if copied:
            backbone.model = backbone.model.merge_and_unload()
    head = _attach_heads(files, kind, backbone.model, statistics, key, action) if kind else None
    template = V01_TEMPLATE if "v01" in settings.source else PromptSpec.template
    spec = PolicySpec(
        settings.out.name, base, action, image, PromptSpec(template),
        TokenSpec("uniform", config.n_action_bins, placement.save()), key, head=head,
    )  # fmt: skip
    policy = LocalPolicy(spec, backbone, statistics, tokenizer)
    policy.save(settings.out, stage="import", settings=dataclasses.asdict(settings), refer=not copied)
    others = f" of {len(statistics)}: {', '.join(sorted(statistics))}" if len(statistics) > 1 else ""
    print(f"imported into {settings.out}; statistics of {key}{others}" + _head_words(spec))
    return settings.out


def _heads_folder(settings: Settings, folder: Path) -> Path:
    return settings.heads or (folder if settings.adapter is None else settings.adapter.parent)


def _oft_files(settings: Settings, folder: Path) -> OftFiles:
    """OpenVLA-OFT's files that belong to the source or the adapter, fetched if need be."""
    if lora_alone(folder):
        raise problem(f"{folder} with a LoRA and no model", "the base that the LoRA was trained on, and the LoRA",
                      f"vla import openvla/openvla-7b --adapter {folder / ADAPTER_FOLDER}")  # fmt: skip
    if settings.heads is None and settings.adapter is None and not Path(settings.source).is_dir():
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(settings.source, revision=folder.name, allow_patterns=list(PATTERNS))
        except (HTTP_ERROR, OSError, ValueError) as error:
            raise explained(error, f"{settings.source}@{folder.name}", "a checkpoint") from error
    return find_files(_heads_folder(settings, folder))


def _platform(settings: Settings, statistics: Statistics, key: str) -> Platform:
    entry = statistics[key]
    state_dim = len(entry["proprio"]["q01"]) if "q01" in entry.get("proprio", {}) else None
    return platform_of(settings.platform, len(entry.get("action", {}).get("q01", NAMES)), state_dim)


def _attach_heads(
    files: OftFiles, kind: Literal["l1", "discrete"], model: Any, statistics: Statistics, key: str, action: ActionSpec
) -> HeadSpec:
    """OFT's parts, in place."""
    target = inner(model)
    head, parts = read_heads(files, kind, target, statistics, key, action.dim)
    attach(model, parts, target.dtype)
    return head


def _head_words(spec: PolicySpec) -> str:
    """What was taken for granted."""
    if spec.head is None:
        return ""
    state = f"a state of {len(spec.head.state_names)}" if spec.head.state_names else "no state"
    return (f"\nOpenVLA-OFT, {spec.head.kind}{' with FiLM' if spec.head.film else ''}: chunks of {spec.action.horizon}, {state}, "
            f"cameras {', '.join(spec.image.cameras)}; no file says the number of images or the chunk: pass --cameras and --horizon "
            "if it was trained with others")  # fmt: skip


def _statistics(settings: Settings, folder: Path, config: OpenVlaConfig) -> Statistics:
    adapter = settings.adapter
    beside = [] if adapter is None else [adapter, *([adapter.parent] if adapter.name == ADAPTER_FOLDER else [])]
    path = settings.statistics or next((f / STATISTICS_FILE for f in beside if (f / STATISTICS_FILE).is_file()), None)
    if path is None:
        statistics = read_statistics(folder, config)
    else:
        try:
            statistics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise problem(
                f"{path}: {error}", "JSON, as OpenVLA's fine-tuning writes it", "correct --statistics"
            ) from error
    if not statistics:
        raise problem(f"no statistics in {folder}", f"norm_stats in config.json, or {STATISTICS_FILE} beside it",
                      "pass --statistics FILE; without them actions have no units")  # fmt: skip
    return statistics


def _action(settings: Settings, statistics: Statistics, key: str, platform: Platform | None) -> ActionSpec:
    entry: dict[str, Any] = statistics[key].get("action", {})
    dim = len(entry.get("q01", NAMES))
    horizon = 1 if platform is None else settings.horizon or platform.horizon
    if platform is None and settings.horizon > 1:
        raise problem(f"--horizon {settings.horizon} of a policy that answers in tokens", "OpenVLA-OFT",
                      "pass --head discrete if it was trained so, or leave it out")  # fmt: skip
    normalization = "bounds_q99" if platform is None else platform.normalization
    action_normalizer(statistics, key, dim, normalization)
    names = NAMES if dim == len(NAMES) else tuple(f"a{i}" for i in range(dim))
    if settings.protocol is not None:
        if dim != len(NAMES):
            raise problem(
                f"{dim} action dimensions of {key!r} with --protocol", f"{len(NAMES)}", "leave out --protocol"
            )
        return ActionSpec(names, horizon, **action_fields(get_protocol(settings.protocol)), normalization=normalization)
    free = np.flatnonzero(~np.asarray(entry.get("mask", [True] * dim), bool)).tolist()
    words = "1 opens, 0 closes" if len(free) == 1 else ""  # how OpenVLA's readers standardise every dataset
    return ActionSpec(
        names, horizon, delta=platform is None or platform.delta, gripper_dim=free[0] if len(free) == 1 else None, gripper_convention=words,
        normalization=normalization,
    )  # fmt: skip


def _image(settings: Settings, config: OpenVlaConfig, platform: Platform | None) -> ImageSpec:
    if platform is None and len(settings.cameras) > 1:
        raise problem(f"--cameras {' '.join(settings.cameras)}", "one: only OpenVLA-OFT was trained with several",
                      "name one, or pass --head discrete if it was trained so")  # fmt: skip
    if config.image_resize_strategy != "resize-naive":
        raise problem(f"image_resize_strategy {config.image_resize_strategy!r}", "resize-naive, as every published OpenVLA",
                      "load it with `vla.backbone.load_backbone`, whose processor knows the others")  # fmt: skip
    size = config.image_sizes[0]
    if settings.protocol is None:  # what the processor would do; its own resize then finds nothing left to do
        return ImageSpec(
            settings.cameras or (platform.cameras if platform else ("image",)), size, resize_filter="bicubic"
        )
    usual = ("agentview",) if platform is None else ("agentview", "wrist")[: len(platform.cameras)]
    spec = image_spec(get_protocol(settings.protocol), settings.cameras or usual, random_crops=settings.random_crops)
    if spec.size_px != size:
        raise problem(f"protocol {settings.protocol} with {spec.size_px} px", f"{size} px, as the checkpoint has",
                      "leave out --protocol")  # fmt: skip
    return spec


def _placement(config: OpenVlaConfig, tokenizer: Any) -> Placement:
    """The last ids before the padding of the vocabulary: the authors subtract it from the model's size."""
    padded = config.text_config.vocab_size
    if padded - config.pad_to_multiple_of != tokenizer.vocab_size:
        raise problem(f"a vocabulary of {padded} padded by {config.pad_to_multiple_of}, and a tokenizer of "
                      f"{tokenizer.vocab_size}", "as many tokens without the padding",
                      "restore config.json and the tokenizer of one checkpoint")  # fmt: skip
    return Placement.tail(
        tokenizer.vocab_size, config.n_action_bins, model_vocab_size=padded, tokenizer_length=len(tokenizer),
        special_ids=tokenizer.all_special_ids,
    )  # fmt: skip
