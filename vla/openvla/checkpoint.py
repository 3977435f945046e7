"""OpenVLA checkpoints as published: found, checked against the model by name and shape, opened.

The names and shapes in the safetensors headers are compared before any weight is read, so a wrong file of 15 GB is known
for one in a second.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vla.openvla.config import OpenVlaConfig
from vla.openvla.model import OpenVlaForActionPrediction
from vla.openvla.processor import OpenVlaProcessor
from vla.types import VlaError, problem

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STATISTICS_FILE = "dataset_statistics.json"
WANTED = ("*.json", "*.safetensors")
"""Files fetched from the Hub: no code, no pickles."""
SHOWN = 8

Shapes = dict[str, tuple[int, ...]]


def open_openvla(
    source: str, processor_source: str | Path, *, dtype: torch.dtype, **options: Any
) -> tuple[OpenVlaForActionPrediction, OpenVlaProcessor]:
    """The model, in evaluation mode, and its processor.

    Args:
        source: folder or Hub id.
        processor_source: the same, for preprocessor_config.json and the tokenizer.
        options: for `from_pretrained`: revision, attn_implementation, quantization_config, device_map, ...

    Raises:
        VlaError: no safetensors, damaged files, or weights that are not the config's by name and shape.
    """
    revision = options.pop("revision", None)
    folder = local_folder(source, revision)
    config = read_config(folder)
    check_weights(weight_shapes(folder), model_shapes(config), str(folder))
    model = OpenVlaForActionPrediction.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, **options
    )
    processor_folder = folder if str(processor_source) == source else local_folder(str(processor_source), None)
    return model.eval(), OpenVlaProcessor.load(processor_folder, model.n_image_tokens)


def local_folder(source: str, revision: str | None) -> Path:
    """The folder itself, or a Hub repository's snapshot in the local cache, fetched if need be."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=list(WANTED)))


def read_config(folder: Path) -> OpenVlaConfig:
    """config.json. Its `auto_map`, the way to remote code, is dropped."""
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise problem(f"no config.json in {folder}", "an OpenVLA checkpoint", "check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file from the checkpoint") from error
    if value.get("model_type") != "openvla":
        raise problem(f"a {value.get('model_type')} model at {folder}", "openvla", "check the path")
    config = OpenVlaConfig.from_dict(value)
    assert isinstance(config, OpenVlaConfig)
    return config


def weight_shapes(folder: Path) -> Shapes:
    """Name -> shape of every tensor in a checkpoint, from the headers of its safetensors files."""
    found: Shapes = {}
    for path, promised in _shards(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise problem(f"{path}: {error}", "a whole safetensors file", "fetch the file again") from error
        if promised is not None and promised != set(shapes):
            raise problem(f"{path.name} with {_short(promised ^ set(shapes))} that only it or {INDEX} names",
                          "the tensors its index lists", "fetch both files again, of one revision")  # fmt: skip
        found.update(shapes)
    return found


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """File -> names it holds according to the index; None without an index."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: None}
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise problem(f"no {SINGLE} in {folder}" + (f", but {', '.join(pickles)}" if pickles else ""),
                      "weights as safetensors; pickles are never opened", "convert them where they come from")  # fmt: skip
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str] | None] = {folder / file: set() for file in names.values()}
        for name, file in names.items():
            if Path(file).name != file:
                raise problem(f"{INDEX} with the file {file!r}", "files of the same folder", "fetch the index again")
            shards[folder / file].add(name)  # pyright: ignore[reportOptionalMemberAccess]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise problem(f"{folder / INDEX}: {error}", 'JSON with a "weight_map"', "fetch the file again") from error
    absent = sorted(path.name for path in shards if not path.is_file())
    if absent:
        raise problem(
            f"no {', '.join(absent)} in {folder}", f"every file that {INDEX} names", "fetch the missing files"
        )
    return shards


def model_shapes(config: OpenVlaConfig) -> Shapes:
    """Name -> shape of every tensor the config's model has; nothing is allocated."""
    with torch.device("meta"):
        model = OpenVlaForActionPrediction(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(found: Shapes, expected: Shapes, where: str) -> None:
    """Every name on both sides, with one shape; VlaError names what is missing, unexpected or misshaped."""
    missing, unexpected = set(expected) - set(found), set(found) - set(expected)
    misshaped = [
        f"{name} {list(found[name])} for {list(expected[name])}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    lines = [f"missing {_short(missing)}"] if missing else []
    lines += [f"unexpected {_short(unexpected)}"] if unexpected else []
    lines += [f"misshaped {_short(misshaped)}"] if misshaped else []
    if not lines:
        return
    fix = "check that config.json and the weights are of one checkpoint"
    near = difflib.get_close_matches(min(unexpected), missing, 1, 0.8) if missing and unexpected else []
    if any("lora_" in name for name in unexpected):
        fix = "this is an adapter, or holds one: give the base model, and the adapter with --adapter"
    elif near:
        fix = f"the names look like {min(unexpected)!r} for {near[0]!r}: convert the checkpoint to the published naming"
    raise problem(f"weights at {where}: " + "; ".join(lines), "exactly the tensors of the config's model", fix)


def read_statistics(folder: Path, config: OpenVlaConfig) -> dict[str, Any]:
    """dataset_statistics.json beside the weights, as fine-tuning leaves it; else those of config.json."""
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return config.norm_stats or {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file from the checkpoint") from error
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise VlaError(f"{path}: got no object of datasets; expected dataset -> statistics; fix: restore the file")
    return value


def _short(names: Sequence[str] | set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
