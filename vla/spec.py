"""`policy.json`: everything besides weights that decides what a policy does, with its checks.

Statistics and preprocessing travel with the weights; that they often do not is the field's most common fault.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla.motion_spec import MotionSpec, check_motion
from vla.prompt_spec import PromptSpec, check_prompt
from vla.tokenizers.placement import Placement
from vla.tokenizers.protocol import ActionTokenizer
from vla.tokenizers.schemes import load_tokenizer, read_scheme
from vla.tokenizers.uniform import UniformTokenizer
from vla.types import problem

FORMAT_VERSION = 2
READABLE = (1, 2)
"""1 had `bins` and no `n_symbols` in `tokens`: uniform bins were the only scheme."""
FILE = "policy.json"
TOKENIZER_FOLDER = "action_tokenizer"
HEAD_FOLDER = "head"


@dataclass(frozen=True)
class ActionSpec:
    """What the numbers in an action mean."""

    names: tuple[str, ...]
    """One name per dimension; D is their count."""
    horizon: int
    """H, actions per chunk."""
    delta: bool = True
    """True: displacements; False: absolute targets."""
    gripper_dim: int | None = None
    """Index of the gripper in an action; None without one."""
    gripper_convention: str = ""
    """In words, e.g. '+1 closes, -1 opens': of the actions the policy learns from."""
    gripper_range: Literal["signed", "unit"] = "signed"
    """Of the gripper the policy learns from. unit: 0..1, brought to -1..1 before the action leaves the policy."""
    gripper_threshold: float | None = None
    """Rounds the gripper to -1 below and +1 above this value, given in `gripper_range`; None: it stays continuous."""
    gripper_invert: bool = False
    """Turns the gripper's sign last, for a robot whose signs are the opposite of the data's."""
    control_hz: float = 0.0
    """Control rate of the training data; 0 if unknown."""
    normalization: Literal["bounds_q99", "bounds"] = "bounds_q99"
    """What is brought to [-1, 1]: quantiles q01 and q99, or minimum and maximum (OpenVLA-OFT's on ALOHA)."""

    @property
    def dim(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class ImageSpec:
    """How a camera frame becomes what the model's own processor is given."""

    cameras: tuple[str, ...]
    """Names looked up in `Observation.images`, in the order the model sees them."""
    size_px: int
    """Frames are resized to size_px x size_px."""
    resize_filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "lanczos3"] = "lanczos"
    """lanczos3 is TensorFlow's, with antialias; the others are Pillow's, whose `lanczos` rounds more often."""
    crop_area: float = 1.0
    """Share of the area kept by a centre crop; 0.9 after training with OpenVLA's random crops."""
    rotation_deg: Literal[0, 90, 180, 270] = 0
    """Counter-clockwise turn applied first; 180 for LIBERO's raw cameras."""
    jpeg_quality: int | None = None
    """After the turn, the frame is stored as JPEG of this quality and read back, both as TensorFlow does; None: not.
    OpenVLA's data went through 95, the default of `tf.io.encode_jpeg`."""
    crop_order: Literal["before_resize", "after_resize"] = "before_resize"
    """before_resize: crop and resize in one step. after_resize: OpenVLA's, the whole frame is resized, then the crop is
    brought back to size_px by `tf.image.crop_and_resize` (bilinear)."""
    fit: Literal["stretch", "pad"] = "stretch"
    """Of frames that are not square: stretched, or made square by black borders as openpi does."""


@dataclass(frozen=True)
class TokenSpec:
    """Which action tokenizer, and where its symbols sit in the model's vocabulary."""

    scheme: str = "uniform"
    """One of `vla.tokenizers.schemes.SCHEMES`; action_tokenizer/ holds its settings and whatever it learned."""
    n_symbols: int = 256
    """`ActionTokenizer.vocab_size`."""
    placement: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`vla.tokenizers.placement.Placement.save()`: kind, and the model vocabulary id of each symbol."""
    n_added: int = 0
    """Rows appended to the embedding before any adapter is attached."""
    added_init: Literal["mean", "numbers"] = "mean"
    """How those rows began: mean of the vocabulary, or the embedding of the number word of the same bin."""


@dataclass(frozen=True)
class HeadSpec:
    """OpenVLA-OFT's parallel decoding (arXiv 2502.19645): a whole chunk from one pass, not token after token."""

    kind: Literal["l1", "discrete"]
    """l1: an MLP reads actions off the hidden states, and `tokens` are not used. discrete: each place says its token."""
    state_names: tuple[str, ...] = ()
    """Dimensions of the state that the model sees as one token, normalised like actions; empty: it sees none."""
    film: bool = False
    """The instruction modulates the vision transformers' blocks (FiLM)."""


@dataclass(frozen=True)
class BackboneSpec:
    """The pretrained model under the policy."""

    source: str
    """'tiny', a Hub id, or a path of a Hugging Face checkpoint."""
    model_type: str = ""
    """`config.model_type`, checked at load."""
    weights: Literal["base", "adapter", "merged"] = "base"
    """base: `source` as it is; adapter: `source` + adapter/; merged: model/, `source` is then only history."""
    revision: str | None = None
    """Of a Hub source."""
    fingerprint: str = ""
    """`vla.backbone.fingerprint` of the source's weights, checked at load."""
    quantization: Literal["none", "nf4"] = "none"
    """What the source's linear layers were packed into while the adapter was trained; loading does the same."""


@dataclass(frozen=True)
class PolicySpec:
    """The contents of `policy.json`."""

    name: str
    backbone: BackboneSpec
    action: ActionSpec
    image: ImageSpec
    prompt: PromptSpec
    tokens: TokenSpec
    unnorm_key: str | None = None
    """Default statistics; None: must be chosen when there are several."""
    temperature: float = 0.0
    """Sampling temperature the policy was last trained with; acting is greedy unless asked."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Libraries and simulator at the time of writing."""
    provenance: tuple[dict[str, Any], ...] = ()
    """One entry per stage that made it: stage, settings, parent."""
    format_version: int = FORMAT_VERSION
    head: HeadSpec | None = None
    """Its weights are in head/. None: actions are tokens, one after the other."""
    motion: MotionSpec | None = None
    """Before its actions the policy says a language motion (`vla.language_motion`). None: it does not."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def says_tokens(self) -> bool:
        """False with an L1 head, which leaves `tokens` unused."""
        return self.head is None or self.head.kind != "l1"

    @property
    def state_names(self) -> tuple[str, ...]:
        """Dimensions of the state that the policy needs, in the prompt or as a token; empty: none."""
        return (self.head.state_names if self.head else ()) or self.prompt.state_names


def check(spec: PolicySpec) -> None:
    """Raise `VlaError` for a spec that contradicts itself."""
    action, tokens, prompt = spec.action, spec.tokens, spec.prompt
    if spec.format_version not in READABLE:
        raise problem(
            f"policy format {spec.format_version}", f"{FORMAT_VERSION} or older", "use the toolkit that wrote it"
        )
    if action.dim < 1 or action.horizon < 1:
        raise problem(f"{action.dim} dimensions x {action.horizon} steps", "at least 1 x 1", "correct `action`")
    _check_gripper(action)
    n_ids = Placement.load(tokens.placement).n_symbols
    if n_ids != tokens.n_symbols:
        raise problem(f"{n_ids} token ids", f"{tokens.n_symbols}, one per symbol", "correct `tokens`")
    _check_image(spec.image)
    if spec.head is not None and spec.head.state_names and prompt.state_names not in ((), spec.head.state_names):
        raise problem(f"a prompt that shows the state {', '.join(prompt.state_names)} and a head that is given "
                      f"{', '.join(spec.head.state_names)}", "one state", "correct `prompt` or `head`")  # fmt: skip
    check_prompt(prompt, action.dim)
    if spec.motion is not None:
        if spec.head is not None:
            raise problem("language motions with a head", "actions as tokens, one after the other", "drop one of them")
        check_motion(spec.motion, prompt.template)


def _check_gripper(action: ActionSpec) -> None:
    if action.gripper_dim is None:
        if (action.gripper_range, action.gripper_threshold, action.gripper_invert) != ("signed", None, False):
            got = f"range {action.gripper_range}, threshold {action.gripper_threshold}, invert {action.gripper_invert}"
            raise problem(f"gripper {got} without a gripper_dim", "its index in an action", "set `action.gripper_dim`")
        return
    if not 0 <= action.gripper_dim < action.dim:
        raise problem(f"gripper_dim {action.gripper_dim}", f"0..{action.dim - 1}", "correct `action.gripper_dim`")
    low = 0.0 if action.gripper_range == "unit" else -1.0
    if action.gripper_threshold is not None and not low < action.gripper_threshold < 1.0:
        raise problem(f"gripper_threshold {action.gripper_threshold} with gripper_range {action.gripper_range!r}",
                      f"{low:g} < gripper_threshold < 1, or null", "correct `action.gripper_threshold`")  # fmt: skip


def _check_image(image: ImageSpec) -> None:
    if not image.cameras:
        raise problem("no cameras", "at least one camera name", "correct `image.cameras`")
    if len(set(image.cameras)) != len(image.cameras):
        raise problem(f"cameras {', '.join(image.cameras)}", "each camera once", "correct `image.cameras`")
    if image.size_px < 1:
        raise problem(f"size_px {image.size_px}", "at least 1", "correct `image.size_px`")
    if not 0.0 < image.crop_area <= 1.0:
        raise problem(f"crop_area {image.crop_area}", "0 < crop_area <= 1", "correct `image.crop_area`")
    if image.crop_area < 1.0 and image.crop_order == "before_resize" and image.fit == "pad":
        raise problem(f"fit 'pad' with crop_area {image.crop_area} before resizing", "crop_order 'after_resize' or "
                      "fit 'stretch'", "correct `image`")  # fmt: skip
    if image.crop_area == 1.0 and image.crop_order == "after_resize":
        raise problem("crop_order 'after_resize' with crop_area 1, which crops nothing", "crop_area < 1, or crop_order "
                      "'before_resize'", "correct `image`")  # fmt: skip
    if image.jpeg_quality is not None and not 1 <= image.jpeg_quality <= 100:
        raise problem(f"jpeg_quality {image.jpeg_quality}", "1..100, or null", "correct `image.jpeg_quality`")


def to_json(spec: PolicySpec) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def from_json(value: dict[str, Any]) -> PolicySpec:
    """Of any readable format; `format_version` stays as it was written."""
    if isinstance(value, dict) and value.get("format_version") == 1 and isinstance(value.get("tokens"), dict):
        tokens = {("n_symbols" if name == "bins" else name): item for name, item in value["tokens"].items()}
        value = {**value, "tokens": tokens}
    return _build(PolicySpec, value, "policy")


def read_spec(folder: Path) -> PolicySpec:
    """`folder/policy.json`. VlaError if it is missing, not JSON, or wrong in any field."""
    path = folder / FILE
    if not path.is_file():
        raise problem(
            f"no {FILE} in {folder}", "a policy directory", "check the path, or train one with `vla finetune`"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file from a copy of the policy") from error
    return from_json(value)


def read_tokenizer(folder: Path, spec: PolicySpec) -> ActionTokenizer:
    """The action tokenizer of a policy directory. VlaError if it is missing, damaged, or not the one `spec` names."""
    if spec.format_version == 1:
        return UniformTokenizer(spec.tokens.n_symbols)
    tokenizer, scheme = load_tokenizer(folder / TOKENIZER_FOLDER), read_scheme(folder / TOKENIZER_FOLDER)["scheme"]
    if (scheme, tokenizer.vocab_size) != (spec.tokens.scheme, spec.tokens.n_symbols):
        raise problem(f"{scheme} with {tokenizer.vocab_size} symbols in {folder / TOKENIZER_FOLDER}",
                      f"{spec.tokens.scheme} with {spec.tokens.n_symbols}, as {FILE} says",
                      "restore the folder from a copy of the policy")  # fmt: skip
    return tokenizer


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from plain JSON; every field is checked against its annotation."""
    if not isinstance(value, dict):
        raise problem(f"{where}: {value!r}", f"an object with the fields of {kind.__name__}", f"correct {FILE}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise problem(f"{where}: unknown {', '.join(unknown)}", f"only {', '.join(fields)}", f"correct {FILE}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise problem(f"{where}: no {name!r}", f"all of {', '.join(fields)}", f"correct {FILE}")
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise problem(f"{where}: {value!r}", f"one of {', '.join(map(str, args))}", f"correct {FILE}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise problem(f"{where}: {value!r}", "a list", f"correct {FILE}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or kind
    if expected is not Any and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
        raise problem(f"{where}: {value!r}", expected.__name__, f"correct {FILE}")
    return value
