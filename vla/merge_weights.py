"""A checkpoint with an adapter folded in, written without ever holding the model: one tensor at a time.

The model is built on torch's `meta` device, where tensors have names and shapes but no memory. PEFT puts the adapter onto
it there, which says what each of its tensors belongs to. Then the base's files are copied tensor by tensor; those the
adapter changes pass through PEFT's own `merge` of that one layer, in float32. Files, their names and the tensors' names
stay those of the base, so whatever opens the base opens the result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from vla.backbone import DTYPES, fingerprint_of
from vla.types import problem
from vla.weight_files import Entry, Files, read_headers, read_tensor, write_tensors

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it is; the others train on another base than the one on disk."""
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Plan:
    """What becomes of the tensors of a base checkpoint."""

    folder: Path
    """Of the base."""
    skeleton: Any
    """The model on the meta device, with the added vocabulary; `config` is that of the result."""
    files: Files
    names: dict[str, str]
    """Tensor in the files -> parameter or buffer of the model. Those without one are copied."""
    changes: dict[str, list[Change]] = field(default_factory=dict)
    """Parameter -> what is done to it, in order, each from and to float32."""
    n_modules: int = 0
    """Layers with an adapter."""

    def __post_init__(self) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}

    def entry(self, file: str, name: str, dtype: torch.dtype | None) -> Entry:
        """Of the result. `dtype`: of its floating-point tensors; None: as in the base."""
        base, parameter = self.files[file][name], self.names.get(name)
        shape = self.shapes[parameter] if parameter in self.changes else base.shape
        return Entry(shape, dtype if dtype is not None and base.dtype.is_floating_point else base.dtype)

    def tensor(self, file: str, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """Of the result."""
        tensor = read_tensor(self.folder / file, name)
        target = self.entry(file, name, dtype).dtype
        for change in self.changes.get(self.names.get(name, ""), ()):
            tensor = change(tensor.float())
        return tensor.to(target)

    def write(self, file: str, target: Path, dtype: torch.dtype | None, advance: Callable[[int], None]) -> None:
        """One file of the result. `advance` is told the bytes of each tensor."""
        entries = {name: self.entry(file, name, dtype) for name in self.files[file]}

        def tensor_of(name: str) -> torch.Tensor:
            advance(entries[name].n_bytes)
            return self.tensor(file, name, dtype)

        write_tensors(target, entries, tensor_of)

    @property
    def config_dtype(self) -> torch.dtype | None:
        """What the base's config.json says its weights are; None if it does not."""
        return DTYPES.get(str(getattr(self.skeleton.config, "dtype", None)).removeprefix("torch."))

    def fingerprint(self) -> str | None:
        """`vla.backbone.fingerprint` of the base; None where the files lack a parameter of the model. Ask before `grow`."""
        where = {parameter: (file, name) for file, names in self.files.items() for name in names
                 if (parameter := self.names.get(name)) is not None}  # fmt: skip
        parameters = [name for name, _ in sorted(self.skeleton.named_parameters())]
        if not all(name in where for name in parameters):
            return None
        return fingerprint_of((name, read_tensor(self.folder / where[name][0], where[name][1])) for name in parameters)


def open_base(folder: Path, weights: str) -> Plan:
    """A plan that changes nothing.

    Args:
        weights: `config.model_type` that the policy names; empty: any.

    Raises:
        VlaError: no safetensors, another model, or weights stored in quantized form.
    """
    files = read_headers(folder)
    config, build = _config(folder)
    if weights and config.model_type != weights:
        raise problem(f"a {config.model_type} model at {folder}", weights, "restore the backbone the policy was trained on")  # fmt: skip
    if getattr(config, "quantization_config", None) is not None:
        raise problem(f"quantized weights at {folder}", "the checkpoint in bfloat16 or float32 that they were made from",
                      "train on that one with quantization as a setting; merging into quantized weights loses the adapter")  # fmt: skip
    with torch.device("meta"):
        skeleton = build(config)
    return Plan(folder, skeleton.eval(), files, _parameter_names(skeleton, files))


def grow(plan: Plan, first: int, n: int, source_ids: list[int] | None) -> None:
    """Rows `first` .. `first + n - 1` of the vocabulary begin as `vla.adapters.add_action_tokens` lets them. Rows before
    `first` that no checkpoint has (its tokenizer knows more tokens than it has rows) are zero.

    Args:
        source_ids: n ids whose rows are copied; None: the mean of the rows before `first`.
    """
    model = plan.skeleton
    old = model.get_input_embeddings().weight.shape[0]
    if first + n > old:
        model.resize_token_embeddings(first + n, mean_resizing=False)

    def change(weight: torch.Tensor) -> torch.Tensor:
        grown = weight.new_zeros(max(old, first + n), *weight.shape[1:])
        grown[: len(weight)] = weight
        source = grown[source_ids] if source_ids is not None else weight[:first].mean(0, keepdim=True)
        grown[first : first + n] = source
        return grown

    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is layer.weight and not plan.changes.get(name):
                plan.changes[name] = [change]
    plan.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def add_adapter(plan: Plan, folder: Path) -> None:
    """Adds to the plan what a PEFT LoRA adapter does: LoRA, DoRA, rsLoRA, trained token rows, modules_to_save, biases.

    Raises:
        VlaError: not LoRA, names or shapes that are not this model's, a tensor missing, or a tied head with LoRA of its own.
    """
    config, path = _adapter_config(folder), folder / ADAPTER_FILE
    parameters = dict(plan.skeleton.named_parameters(remove_duplicate=False))
    shared = _shared_names(plan.skeleton)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that are tied or were loaded without memory; both are handled here
        try:
            model = get_peft_model(plan.skeleton, config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise problem(f"{folder}: {error}", "an adapter of this model", "restore the base it was trained on") from error  # fmt: skip
    found = _adapter_header(path)
    left = dict(found)
    saved = {id(tensor): key for key, tensor in get_peft_model_state_dict(
        model, dict(model.named_parameters(remove_duplicate=False)), save_embedding_layers=False).items()}  # fmt: skip
    changes: dict[str, Change] = {}
    for name, module in model.named_modules():
        name = name.removeprefix(PREFIX)
        if isinstance(module, LoraLayer | ModulesToSaveWrapper) and f"{name}.weight" in shared:
            raise problem(f"an adapter of {name}, whose weights are also those of {min(shared[f'{name}.weight'] - {f'{name}.weight'})}",
                          "trained token rows, or layers with weights of their own", "serve the adapter unmerged")  # fmt: skip
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            keys = {part: saved[id(tensor)] for part, tensor in module.named_parameters() if "base_layer" not in part}
            _take(left, {key: module.get_parameter(part).shape for part, key in keys.items()}, path)
            plan.n_modules += 1
            changes |= _layer_changes(name, module, keys, path)
        elif isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
            rows = module.token_adapter.token_indices["default"]
            _take(left, {key: module.token_adapter.trainable_tokens_delta["default"].shape}, path)
            changes[f"{name}.weight"] = _token_rows(rows, path, key)
    replaced = {_base_name(key): key for key in left}
    if unknown := sorted(key for name, key in replaced.items() if name not in parameters):
        raise problem(f"{path} with {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                      "tensors of this model", "restore the base that the adapter was trained on")  # fmt: skip
    for name, key in replaced.items():
        _take(left, {key: parameters[name].shape}, path)
        _append(plan, shared, name, lambda weight, key=key: read_tensor(path, key).float())
    for name, change in changes.items():
        _append(plan, shared, name, change)
    present = set(plan.names.values())
    for name in [name for name in plan.changes if name not in present and not shared.get(name, set()) & present]:
        raise problem(f"no tensor at {plan.folder} that becomes {name} as it is", "one, for the adapter to be added to",
                      "this family stores it fused: serve the adapter unmerged")  # fmt: skip


def _layer_changes(name: str, module: LoraLayer, keys: Mapping[str, str], path: Path) -> dict[str, Change]:
    def weight(base: torch.Tensor) -> torch.Tensor:
        layer = cast(Any, copy.deepcopy(module)).to_empty(device="cpu")
        layer.get_base_layer().weight.data = base
        if getattr(layer.get_base_layer(), "bias", None) is not None:  # uninitialised, and not asked for
            layer.get_base_layer().bias.data.zero_()
        for part, key in keys.items():
            layer.get_parameter(part).data = read_tensor(path, key).float()
        with torch.no_grad():
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise problem(f"{name}: {error}", "finite weights", "go back to an earlier checkpoint") from error
        return layer.get_base_layer().weight.data

    def bias(base: torch.Tensor) -> torch.Tensor:
        return base + read_tensor(path, keys["lora_B.default.bias"]).float() * module.scaling["default"]

    found: dict[str, Change] = {f"{name}.weight": weight}
    return found | ({f"{name}.bias": bias} if "lora_B.default.bias" in keys else {})


def _token_rows(rows: list[int], path: Path, key: str) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        return weight.index_copy(0, torch.tensor(rows), read_tensor(path, key).float())

    return change


def _append(plan: Plan, shared: dict[str, set[str]], name: str, change: Change) -> None:
    """Whichever of the names of one tensor the files have, it is changed."""
    for other in sorted(shared.get(name, {name})):
        plan.changes.setdefault(other, []).append(change)


def _take(left: dict[str, tuple[int, ...]], wanted: Mapping[str, Any], path: Path) -> None:
    for key, shape in wanted.items():
        found = left.pop(key, None)
        if found != tuple(shape):
            got = f"no {key}" if found is None else f"{key} {list(found)}"
            raise problem(f"{got} in {path}", f"it, of shape {list(shape)}", "restore the adapter, or its own base")


def _base_name(key: str) -> str:
    """'base_model.model.lm_head.base_layer.weight' -> 'lm_head.weight'."""
    for part in (".base_layer", ".token_adapter", ".original_module"):
        key = key.replace(part, "")
    return key.removeprefix(PREFIX)


def _shared_names(model: nn.Module) -> dict[str, set[str]]:
    """Name -> all names of its tensor, for tensors with more than one."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def _parameter_names(model: Any, files: Files) -> dict[str, str]:
    """As transformers renames them when it loads; tensors that it computes from several in the files are left out."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own, found = model.state_dict(), {}
    for name in (name for names in files.values() for name in names):
        renamed, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed not in own and name in own:
            renamed = name
        if renamed in own and fused is None:
            found[name] = renamed
    return found


def _config(folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    try:
        if PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == "openvla":
            from vla.openvla.checkpoint import read_config
            from vla.openvla.model import OpenVlaForActionPrediction

            return read_config(folder), OpenVlaForActionPrediction
        return AutoConfig.from_pretrained(folder), AutoModelForImageTextToText.from_config
    except (OSError, ValueError, KeyError) as error:
        raise problem(f"{folder}: {error}", "a checkpoint that AutoModelForImageTextToText loads", "check the path") from error  # fmt: skip


def _adapter_config(folder: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise problem(f"{folder}: {error}", "adapter_config.json of a PEFT adapter", "restore it from a copy") from error  # fmt: skip
    if not isinstance(config, LoraConfig):
        raise problem(f"a {config.peft_type} adapter", "LoRA, DoRA or rsLoRA", "serve it unmerged")
    if config.init_lora_weights not in KEEPS_BASE:
        raise problem(f"an adapter with init_lora_weights {config.init_lora_weights!r}, which changed the base it was "
                      "trained on", "one that left its base as it is on disk",
                      "convert it to plain LoRA with PEFT (`save_pretrained(path_initial_model_for_weight_conversion=)`)")  # fmt: skip
    return config


def _adapter_header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise problem(f"{path}: {error}", "a whole safetensors file", "restore the adapter from a copy") from error
