"""`vla import`: a policy directory of ours from a published OpenVLA checkpoint, or from a LoRA of the authors' script.

    vla import openvla/openvla-7b --out runs/openvla --unnorm-key bridge_orig
    vla import openvla/openvla-7b-finetuned-libero-spatial --out runs/spatial --unnorm-key libero_spatial --protocol openvla
    vla import openvla/openvla-7b --adapter adapter-tmp/my-run --statistics runs/my-run/dataset_statistics.json --out runs/mine

The weights are checked by name and shape and stay where they are, unless `--copy`. What the authors keep in code or in
their readers' heads (statistics, prompt, action ids, image path, gripper) is written into policy.json.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vla.backbone import DTYPES, fingerprint, load_backbone
from vla.libero_protocol import action_fields, get_protocol, image_spec
from vla.normalize import Statistics, action_normalizer, choose_key
from vla.openvla.adapter import attach_adapter
from vla.openvla.checkpoint import STATISTICS_FILE, local_folder, read_config, read_statistics
from vla.openvla.config import OpenVlaConfig
from vla.policy import LocalPolicy
from vla.spec import ActionSpec, BackboneSpec, ImageSpec, PolicySpec, PromptSpec, TokenSpec
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
    camera: str = ""
    """Camera shown to the policy. Default: agentview with --protocol, image without."""
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
    _refuse_oft(settings, folder)
    config = read_config(folder)
    statistics = _statistics(settings, folder, config)
    key = choose_key(statistics, settings.unnorm_key)
    action, image = _action(settings, statistics, key), _image(settings, config)
    backbone = load_backbone(str(folder), dtype=settings.dtype)
    tokenizer = UniformTokenizer(config.n_action_bins)
    placement = _placement(config, backbone.processor.tokenizer)
    base = BackboneSpec(
        str(folder.resolve()) if is_folder else settings.source, "openvla", "base",
        None if is_folder else folder.name, fingerprint(backbone.model),
    )  # fmt: skip
    if settings.adapter is not None:
        backbone.model = attach_adapter(backbone.model, settings.adapter)
        if settings.copy:
            backbone.model = backbone.model.merge_and_unload()
    template = V01_TEMPLATE if "v01" in settings.source else PromptSpec.template
    spec = PolicySpec(
        settings.out.name, base, action, image, PromptSpec(template),
        TokenSpec("uniform", config.n_action_bins, placement.save()), key,
    )  # fmt: skip
    policy = LocalPolicy(spec, backbone, statistics, tokenizer)
    policy.save(settings.out, stage="import", settings=dataclasses.asdict(settings), refer=not settings.copy)
    others = f" of {len(statistics)}: {', '.join(sorted(statistics))}" if len(statistics) > 1 else ""
    print(f"imported into {settings.out}; statistics of {key}{others}")
    return settings.out


def _refuse_oft(settings: Settings, folder: Path) -> None:
    """Its config.json is OpenVLA's, but its actions come from a head: as tokens they would be noise."""
    if Path(settings.source).is_dir():
        names = [path.name for path in folder.iterdir()]
    else:
        from huggingface_hub import list_repo_files

        names = list_repo_files(settings.source, revision=folder.name)
    heads = sorted(name for name in names if name.startswith(("action_head--", "noisy_action_projector--")))
    if heads:
        raise problem(f"{settings.source} with {heads[0]}, an OpenVLA-OFT checkpoint", "an OpenVLA that answers in tokens",
                      "drive it from Python with `vla.openvla.oft`: a policy directory holds no such head")  # fmt: skip


def _statistics(settings: Settings, folder: Path, config: OpenVlaConfig) -> Statistics:
    beside = None if settings.adapter is None else settings.adapter / STATISTICS_FILE
    path = settings.statistics or (beside if beside is not None and beside.is_file() else None)
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


def _action(settings: Settings, statistics: Statistics, key: str) -> ActionSpec:
    entry: dict[str, Any] = statistics[key].get("action", {})
    dim = len(entry.get("q01", NAMES))
    action_normalizer(statistics, key, dim)
    names = NAMES if dim == len(NAMES) else tuple(f"a{i}" for i in range(dim))
    if settings.protocol is not None:
        if dim != len(NAMES):
            raise problem(
                f"{dim} action dimensions of {key!r} with --protocol", f"{len(NAMES)}", "leave out --protocol"
            )
        return ActionSpec(names, 1, **action_fields(get_protocol(settings.protocol)))
    free = np.flatnonzero(~np.asarray(entry.get("mask", [True] * dim), bool)).tolist()
    words = "1 opens, 0 closes" if len(free) == 1 else ""  # how OpenVLA's readers standardise every dataset
    return ActionSpec(names, 1, gripper_dim=free[0] if len(free) == 1 else None, gripper_convention=words)


def _image(settings: Settings, config: OpenVlaConfig) -> ImageSpec:
    if config.image_resize_strategy != "resize-naive":
        raise problem(f"image_resize_strategy {config.image_resize_strategy!r}", "resize-naive, as every published OpenVLA",
                      "load it with `vla.backbone.load_backbone`, whose processor knows the others")  # fmt: skip
    size = config.image_sizes[0]
    if settings.protocol is None:  # what the processor would do; its own resize then finds nothing left to do
        return ImageSpec((settings.camera or "image",), size, resize_filter="bicubic")
    spec = image_spec(
        get_protocol(settings.protocol), (settings.camera or "agentview",), random_crops=settings.random_crops
    )
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
