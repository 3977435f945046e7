"""`vla merge`: fold a policy's adapter into its weights, on the CPU, in the memory of one layer.

    vla merge --policy runs/rl/policy --out runs/merged
    vla merge --policy runs/sft/policy --out runs/merged --dtype bf16
    vla merge --policy runs/sft/policy --out runs/merged --no-check        # a model of which two do not fit into memory

The result's model/ folder is a plain Hugging Face checkpoint that stock transformers opens, and the form that can be
quantized. Afterwards the logits on a fixed input are compared with those of the adapter; a merge that changes them is not
written. A merge that was killed goes on with the file it was at when the same command is run again.

An adapter trained on a quantized base (QLoRA) is merged into the weights the base was quantized from. It was trained to
make up for their rounding, so the result is not quite the policy that was trained: how far the logits moved is printed and
stored. Quantizing the result (`--quantization nf4` of `vla serve` and `vla eval`) rounds once more, base and adapter.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla.backbone import DTYPES, resolve_source
from vla.card_facts import CARD_FILE, read_facts, without_evaluations
from vla.files import swap_folder, write_json, write_text
from vla.hub_policy import backbone_folder, policy_folder
from vla.merge_check import Probe, compare, probe, probe_logits
from vla.merge_weights import ADAPTER_FILE, Plan, add_adapter, grow, open_base
from vla.model_card import model_card
from vla.policy import load_policy
from vla.policy_files import STATISTICS_FILE, library_versions, read_statistics
from vla.progress import Progress
from vla.spec import FILE, FORMAT_VERSION, HEAD_FOLDER, TOKENIZER_FOLDER, PolicySpec, read_spec, read_tokenizer, to_json
from vla.tokenizers.placement import Placement
from vla.types import problem
from vla.weight_files import INDEX

__all__ = ["Settings", "probe_logits", "run"]

KEEP = "keep"
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest change of an action-token logit, in standard deviations of the logits, by how the merged weights are stored."""
RECORD = "merge.json"


@dataclass(frozen=True)
class Settings:
    """Settings of `vla merge`."""

    policy: Path
    """Policy directory with an adapter, or OWNER/NAME of one on the Hub."""
    out: Path
    """Folder of the merged policy; must not exist."""
    dtype: str = KEEP
    """Data type the merged weights are stored in: keep (what the base's config.json says), float32, bfloat16 (bf16) or
    float16 (fp16)."""
    tolerance: float | None = None
    """Largest allowed change of an action-token logit, as a share of the logits' standard deviation. Default: 0.001, 0.05 for
    float16, 0.3 for bfloat16."""
    check: bool = True
    """Load both policies, one after the other, in float32, and compare their logits. --no-check for models that do not fit."""


def run(settings: Settings) -> Path:
    """Merge, check and write; returns `out`."""
    name = SHORT.get(settings.dtype, settings.dtype)
    if settings.out.exists():
        raise problem(f"{settings.out} exists", "a new folder", "choose another --out, or delete it")
    if name not in (KEEP, *DTYPES):
        raise problem(f"dtype {settings.dtype!r}", f"one of {KEEP}, {', '.join(DTYPES)}", "correct --dtype")
    folder = policy_folder(settings.policy)
    spec = read_spec(folder)
    if spec.backbone.weights != "adapter":
        raise problem(f"{folder} with {spec.backbone.weights} weights", "a policy with an adapter", "use it as it is")
    if not (folder / "adapter" / ADAPTER_FILE).is_file():
        raise problem(f"no adapter/{ADAPTER_FILE} in {folder}", f"it, as {FILE} says weights='adapter'",
                      "restore the folder from a copy of the policy")  # fmt: skip
    plan = make_plan(spec, folder)
    dtype = DTYPES.get(name, plan.config_dtype)
    temporary = settings.out.with_name(f".{settings.out.name}.merging")
    _claim(temporary, _identity(folder, plan, name))
    try:
        stored = write_weights(plan, temporary / "model", dtype)
        figures: dict[str, Any] = {}
        write_rest(plan, spec, folder, temporary, settings, figures)
        if settings.check:
            figures = _check(settings, spec, folder, temporary, stored)
            write_rest(plan, spec, folder, temporary, settings, figures)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise problem(f"a full disk at {temporary}", f"{_size_mb(plan, dtype):.0f} MB for the merged weights",
                      "free some space and run the same command again: it goes on with the file it was at") from error  # fmt: skip
    (temporary / RECORD).unlink()
    swap_folder(temporary, settings.out)
    print(f"merged {plan.n_modules} layers into {settings.out}; " + _summary(figures))
    return settings.out


def make_plan(spec: PolicySpec, folder: Path) -> Plan:
    """What the adapter of a policy does to the files of its base. VlaError where the two do not fit."""
    base = backbone_folder(resolve_source(spec.backbone.source), spec.backbone.revision)
    plan = open_base(base, spec.backbone.model_type)
    found, wanted = plan.fingerprint(), spec.backbone.fingerprint
    if found is not None and wanted not in ("", found):
        raise problem(f"weights {found} at {base}", f"{wanted}, which the adapter was trained on",
                      "restore those weights, or fine-tune again on the new ones")  # fmt: skip
    if spec.tokens.n_added:
        first, n = min(Placement.load(spec.tokens.placement).ids), spec.tokens.n_added
        grow(plan, first, n, _number_ids(folder, n) if spec.tokens.added_init == "numbers" else None)
    add_adapter(plan, folder / "adapter")
    return plan


def write_weights(plan: Plan, target: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Every file of the checkpoint that is not there yet, and its index; returns the coarsest type of a merged tensor."""
    entries = {file: {name: plan.entry(file, name, dtype) for name in names} for file, names in plan.files.items()}
    sizes = {file: sum(entry.n_bytes for entry in part.values()) for file, part in entries.items()}
    done = [file for file in sizes if (target / file).is_file()]
    missing, free = sum(sizes.values()) - sum(sizes[file] for file in done), shutil.disk_usage(target.parent).free
    if missing > free:
        raise OSError(errno.ENOSPC, "no space", str(target))
    target.mkdir(exist_ok=True)
    written = float(sum(sizes[file] for file in done))
    with Progress("merge (MB)", round(sum(sizes.values()) / 1e6), round(written / 1e6)) as progress:
        for file in plan.files:
            if file in done:
                continue

            def advance(n_bytes: int, file: str = file) -> None:
                nonlocal written
                written += n_bytes
                progress.advance(round(written / 1e6) - progress.done, file)

            plan.write(file, target / file, dtype, advance)
    if len(plan.files) > 1:
        weight_map = {name: file for file, names in plan.files.items() for name in names}
        write_json(target / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    merged = {
        entry.dtype for part in entries.values() for name, entry in part.items() if plan.names.get(name) in plan.changes
    }
    return max(merged, key=lambda kind: TOLERANCES.get(kind, 0.0))


def write_rest(
    plan: Plan, spec: PolicySpec, folder: Path, target: Path, settings: Settings, figures: dict[str, Any]
) -> None:
    """Everything of the policy directory besides its weights."""
    for part in ("processor", "tokenizer", *((HEAD_FOLDER,) if spec.head is not None else ())):
        if not (folder / part).is_dir():
            raise problem(
                f"no {part}/ in {folder}", "all of a policy directory", "restore it from a copy of the policy"
            )
        shutil.copytree(folder / part, target / part, dirs_exist_ok=True)
    shutil.copytree(folder / "processor", target / "model", dirs_exist_ok=True)
    (target / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    read_tokenizer(folder, spec).save(target / TOKENIZER_FOLDER)
    _write_config(plan, target / "model", DTYPES.get(SHORT.get(settings.dtype, settings.dtype), plan.config_dtype))
    entry = {"stage": "merge", "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)), **figures}
    merged = dataclasses.replace(
        spec, backbone=dataclasses.replace(spec.backbone, weights="merged", quantization="none"), versions=library_versions(),
        format_version=FORMAT_VERSION, provenance=(*spec.provenance, entry),
    )  # fmt: skip
    statistics, facts = read_statistics(folder / STATISTICS_FILE), without_evaluations(read_facts(folder))
    write_json(target / STATISTICS_FILE, statistics)
    if plan.skeleton.config.model_type == "openvla":  # where its authors' code looks for them, and `vla import`
        write_json(target / "model" / STATISTICS_FILE, statistics)
    write_json(target / FILE, to_json(merged))
    if facts:
        write_json(target / CARD_FILE, facts)
    write_text(target / "README.md", model_card(merged, statistics, facts))


def _write_config(plan: Plan, target: Path, dtype: torch.dtype | None) -> None:
    """config.json and, as every loaded backbone has it, a generation config without the checkpoint's own penalties."""
    model = plan.skeleton
    if model.config.model_type == "openvla":
        from vla.openvla.config import published

        kept = next(iter(next(iter(plan.files.values())).values())).dtype
        write_json(target / "config.json", published(model.config, dtype or kept))
    else:
        model.config.architectures = [type(model).__name__]
        for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
            if dtype is not None and config is not None:
                config.dtype = str(dtype).removeprefix("torch.")
        model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)


def _number_ids(folder: Path, n: int) -> list[int]:
    from transformers import AutoTokenizer

    from vla.adapters import number_ids

    return number_ids(AutoTokenizer.from_pretrained(folder / "tokenizer"), n)


def _check(settings: Settings, spec: PolicySpec, folder: Path, target: Path, stored: torch.dtype) -> dict[str, Any]:
    """Compare the logits of adapter and merged weights; the merged ones are removed if they differ too much."""
    tolerance = settings.tolerance if settings.tolerance is not None else TOLERANCES[stored]
    before, after = _probe(folder), _probe(target)
    found = compare(before, after)
    moved = "logit_change" if spec.says_tokens else "action_change"
    if not found.change <= tolerance:
        shutil.rmtree(target)
        raise problem(f"{moved.split('_')[0]}s that moved by {found.change:.2g} of their standard deviation in the merge; {found.reason}",
                      f"at most {tolerance:g}", "report this model family and serve the adapter unmerged meanwhile, or pass "
                      "--tolerance")  # fmt: skip
    same = {"same_choice": found.same_choice} if spec.says_tokens else {}
    figures: dict[str, Any] = {moved: found.change, "tolerance": tolerance, **same}
    if spec.backbone.quantization != "none":
        trained = compare(_probe(folder, full_base=False), after)
        same = {"same_choice": trained.same_choice} if spec.says_tokens else {}
        figures["adapter_on_quantized"] = {moved: trained.change, **same}
    return figures


def _probe(folder: Path, full_base: bool = True) -> Probe:
    return probe(load_policy(folder, dtype="float32", full_base=full_base))


def _summary(figures: dict[str, Any]) -> str:
    if not figures:
        return "not checked"
    what, change, same = _figures_in_words(figures)
    text = f"largest change of {what} {change:.2g} of their standard deviation (at most {figures['tolerance']:g}){same}"
    if trained := figures.get("adapter_on_quantized"):
        what, change, same = _figures_in_words(trained)
        text += (f"\nnote: the adapter was trained on a base in 4 bits; from that policy, the largest change of {what} is "
                 f"{change:.2g}{same}. Evaluate the merged policy before you trust it.")  # fmt: skip
    return text


def _figures_in_words(figures: dict[str, Any]) -> tuple[str, float, str]:
    """('a logit', its change, '; the same token in 99.0% of probes'); with an L1 head ('an action', its change, '')."""
    if "action_change" in figures:
        return "an action", figures["action_change"], ""
    return "a logit", figures["logit_change"], f"; the same token in {figures['same_choice']:.1%} of probes"


def _identity(folder: Path, plan: Plan, dtype: str) -> str:
    """Of this merge: files of another one in the temporary folder are of no use."""
    paths = [folder / FILE, *sorted((folder / "adapter").iterdir()), *(plan.folder / file for file in plan.files)]
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps([str(folder.resolve()), dtype, marks]).encode()).hexdigest()


def _claim(temporary: Path, identity: str) -> None:
    record = temporary / RECORD
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != {"merge": identity}:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_json(record, {"merge": identity})


def _size_mb(plan: Plan, dtype: torch.dtype | None) -> float:
    return sum(plan.entry(file, name, dtype).n_bytes for file, names in plan.files.items() for name in names) / 1e6
