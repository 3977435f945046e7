"""Writing a policy directory, whole or not at all, and reading what several programs read of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from vla.backbone import Backbone
from vla.files import swap_folder, write_json, write_text
from vla.model_card import model_card
from vla.normalize import Statistics
from vla.spec import FILE, FORMAT_VERSION, HEAD_FOLDER, TOKENIZER_FOLDER, PolicySpec, to_json
from vla.tokenizers.protocol import ActionTokenizer
from vla.types import problem

STATISTICS_FILE = "dataset_statistics.json"


def save_policy(
    folder: Path, spec: PolicySpec, backbone: Backbone, statistics: Statistics, tokenizer: ActionTokenizer, *, stage: str,
    settings: dict[str, Any], refer: bool, weights: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """See `vla.policy.LocalPolicy.save`."""
    peft = isinstance(backbone.model, PeftModel)
    kind = "adapter" if peft else "base" if refer else "merged"
    entry = {"stage": stage, "settings": json.loads(json.dumps(settings, default=str))}
    written = dataclasses.replace(
        spec, backbone=dataclasses.replace(spec.backbone, weights=kind), versions=library_versions(),
        format_version=FORMAT_VERSION, provenance=(*spec.provenance, entry),
    )  # fmt: skip
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, written, backbone, statistics, tokenizer, refer, weights)
        swap_folder(temporary, folder)
    except BaseException:  # a full disk should not be fuller afterwards
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    folder: Path, spec: PolicySpec, backbone: Backbone, statistics: Statistics, tokenizer: ActionTokenizer, refer: bool,
    weights: dict[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """The files of a policy directory, into an empty folder."""
    peft = isinstance(backbone.model, PeftModel)
    backbone.processor.save_pretrained(folder / "processor")
    backbone.processor.tokenizer.save_pretrained(folder / "tokenizer")
    if peft:
        backbone.model.save_pretrained(folder / "adapter", save_embedding_layers=False, state_dict=weights)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is one level up
    elif not refer:
        backbone.model.save_pretrained(folder / "model", state_dict=_base_weights(spec, backbone, weights))
        backbone.processor.save_pretrained(folder / "model")
        if backbone.config.model_type == "openvla":  # where its authors' code looks for them
            write_json(folder / "model" / STATISTICS_FILE, statistics)
    if spec.head is not None:
        from vla.openvla.oft_model import write_parts

        write_parts(folder / HEAD_FOLDER, backbone.model, weights)
    (folder / TOKENIZER_FOLDER).mkdir()
    tokenizer.save(folder / TOKENIZER_FOLDER)
    write_json(folder / STATISTICS_FILE, statistics)
    write_json(folder / FILE, to_json(spec))
    write_text(folder / "README.md", model_card(spec, statistics))


def _base_weights(
    spec: PolicySpec, backbone: Backbone, weights: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """`weights`, or the model's own, without those of a head, which have files of their own."""
    if spec.head is None:
        return weights
    from vla.openvla.oft_model import without_parts

    return without_parts(backbone.model, weights)


def library_versions() -> dict[str, str]:
    """Installed versions of what can change results."""
    found = {}
    for name in ("vla-toolkit", "torch", "transformers", "peft", "timm", "numpy", "pillow", "mujoco", "metaworld"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_statistics(path: Path) -> Statistics:
    if not path.is_file():
        raise problem(f"no {path.name} in {path.parent}", "the statistics the policy was trained with",
                      "restore the file; without it actions have no units")  # fmt: skip
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file from a copy of the policy") from error
