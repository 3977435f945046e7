"""OpenVLA-OFT checkpoints as the authors' `finetune.py` leaves them (moojink/openvla-oft@213c5ff).

    config.json, *.safetensors              OpenVLA with the LoRA merged into it, or
    lora_adapter/                           the LoRA alone, to be put on the base it was trained on
    action_head--150000_checkpoint.pt       L1 regression or diffusion; none: discrete
    proprio_projector--..., vision_backbone--...      with a state; with FiLM
    noisy_action_projector--...             diffusion
    dataset_statistics.json                 of actions, and of the state as `proprio`

Not in any file: how many images the model was given, how long its chunks are, and what bounds actions and state were
normalised by. The authors take these from the command line, the latter two from whether it contains "libero", "aloha" or
"bridge" (`prismatic/vla/constants.py`). Here `PLATFORMS` has them, chosen by the sizes of action and state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla.libero_protocol import STATE_NAMES
from vla.normalize import Statistics
from vla.openvla.model import OpenVlaForActionPrediction
from vla.openvla.oft import L1Head, ProprioProjector, load_head, load_proprio
from vla.openvla.oft_model import OftParts
from vla.openvla.torch_file import read_tensors
from vla.spec import HeadSpec
from vla.types import problem

ADAPTER_FOLDER = "lora_adapter"
HEAD, PROPRIO, VISION, NOISE = "action_head", "proprio_projector", "vision_backbone", "noisy_action_projector"
PATTERNS = tuple(f"{kind}--*" for kind in (HEAD, PROPRIO, VISION, NOISE))
"""Of the files read here, none of which is unpickled (`torch_file`)."""
Kind = Literal["auto", "tokens", "l1", "discrete"]


@dataclass(frozen=True)
class Platform:
    """A robot's constants."""

    horizon: int
    action_dim: int
    state_dim: int
    normalization: Literal["bounds_q99", "bounds"]
    cameras: tuple[str, ...]
    delta: bool = True


PLATFORMS = {
    "libero": Platform(8, 7, 8, "bounds_q99", ("image", "wrist_image")),
    "aloha": Platform(25, 14, 14, "bounds", ("image", "left_wrist_image", "right_wrist_image"), False),
    "bridge": Platform(5, 7, 7, "bounds_q99", ("image",)),
}


@dataclass(frozen=True)
class OftFiles:
    """What a folder holds beside an OpenVLA."""

    action_head: Path | None = None
    proprio: Path | None = None
    vision: Path | None = None


def find_files(folder: Path) -> OftFiles:
    """VlaError for a diffusion head, and for files of several steps."""
    found = {}
    for kind in (HEAD, PROPRIO, VISION, NOISE):
        paths = sorted(folder.glob(f"{kind}--*"))
        if len(paths) > 1:
            raise problem(f"{', '.join(path.name for path in paths)} in {folder}", f"one {kind}",
                          "move those of other steps elsewhere")  # fmt: skip
        found[kind] = paths[0] if paths else None
    names = read_tensors(found[HEAD]) if found[HEAD] else {}
    if found[NOISE] or any(name.startswith("noise_predictor.") for name in names):
        file = found[NOISE] or found[HEAD]
        raise problem(f"{file}, of a diffusion head", "an L1 head, or discrete tokens: those are the heads written here",
                      "train with --head l1, or use the authors' code for this checkpoint")  # fmt: skip
    return OftFiles(found[HEAD], found[PROPRIO], found[VISION])


def head_kind(files: OftFiles, asked: Kind, where: str) -> Literal["l1", "discrete"] | None:
    """What acts: told by the files, where it is not asked for. None: tokens, one after the other."""
    if asked in ("auto", "l1") and files.action_head is not None:
        return "l1"
    if asked == "l1":
        raise problem(f"no {HEAD}--*_checkpoint.pt in {where}", "the L1 head", "pass --heads FOLDER, or fetch the file")
    held = [path.name for path in (files.action_head, files.proprio, files.vision) if path is not None]
    if asked == "tokens" and held or asked == "discrete" and files.action_head is not None:
        raise problem(f"--head {asked} with {held[0]}", "what the checkpoint was trained for", "leave out --head")
    return "discrete" if asked == "discrete" or held else None


def platform_of(name: str, action_dim: int, state_dim: int | None) -> Platform:
    """By name or, `auto`, by sizes; LIBERO's where those say nothing, as the authors do."""
    if name != "auto":
        platform = PLATFORMS[name]
        if platform.action_dim != action_dim:
            raise problem(
                f"platform {name} with {action_dim} action dimensions", f"{platform.action_dim}", "correct --platform"
            )
        return platform
    for platform in PLATFORMS.values():
        if platform.action_dim == action_dim and state_dim in (None, platform.state_dim):
            return platform
    return PLATFORMS["libero"]


def read_heads(
    files: OftFiles, kind: Literal["l1", "discrete"], model: OpenVlaForActionPrediction, statistics: Statistics, key: str,
    action_dim: int,
) -> tuple[HeadSpec, OftParts]:  # fmt: skip
    """The parts that the model gets, checked against it and the statistics; FiLM's weights are not among them.

    Raises:
        VlaError: a file of another model or another robot.
    """
    llm_dim = model.config.text_config.hidden_size
    head: L1Head | None = None
    if kind == "l1":
        assert files.action_head is not None
        head = load_head(files.action_head)
        _check(files.action_head, "hidden size", head.model.fc1.in_features // head.action_dim, llm_dim)
        _check(files.action_head, "action dimensions", head.action_dim, action_dim)
    projector: ProprioProjector | None = None
    if files.proprio is not None:
        projector = load_proprio(files.proprio)
        n_stored = len(statistics[key].get("proprio", {}).get("q01", ()))
        _check(files.proprio, "hidden size", projector.fc1.out_features, llm_dim)
        _check(files.proprio, f"state dimensions, in the statistics of {key!r}", projector.fc1.in_features, n_stored)
    names = state_names(projector.fc1.in_features) if projector is not None else ()
    return HeadSpec(kind, names, files.vision is not None), OftParts(head, projector)


def state_names(n: int) -> tuple[str, ...]:
    """LIBERO's for its eight numbers, which the authors' data have in this order; else s0, s1, ..."""
    return STATE_NAMES if n == len(STATE_NAMES) else tuple(f"s{i}" for i in range(n))


def lora_alone(folder: Path) -> bool:
    """Whether a folder holds a LoRA and heads but no model."""
    return (folder / ADAPTER_FOLDER).is_dir() and not (folder / "config.json").is_file()


def _check(path: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise problem(f"{path} for {found} {what}", f"{expected}", "give the files of one checkpoint")
