"""The README.md of a policy directory: a model card in the Hub's form, written from `policy.json`, the statistics and card.json.

Every figure stands with the command that gave it. The metadata block is `huggingface_hub`'s own, so that the Hub reads it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vla.card_facts import Facts, read_facts, run_facts, this_command, with_entry, write_facts
from vla.files import write_text
from vla.normalize import Statistics
from vla.spec import ImageSpec, PolicySpec, read_spec

HUB_DATASET = "hf://datasets/"
LABELS = {
    "loss": "training loss",
    "action_token_accuracy": "training accuracy of action tokens, teacher-forced",
    "l1": "training L1 error, normalised",
    "holdout_loss": "held-out loss",
    "holdout_action_token_accuracy": "held-out accuracy of action tokens, teacher-forced",
    "holdout_l1": "held-out L1 error, normalised",
    "free_running_action_token_accuracy": "held-out accuracy of action tokens, free-running",
    "lowest_holdout_loss": "lowest held-out loss",
    "samples_per_s": "samples per second",
    "success": "success rate in the simulator",
}
"""Figures of metrics.jsonl that a card shows, in this order; others that are held-out, free-running or rates of success of
one task come after them."""
RL_LABELS = {
    "success": "success rate of the training roll-outs, sampled",
    "highest_success": "highest of them",
    "kept": "groups with different rewards",
    "generated": "groups drawn",
    "loss": "policy loss",
    "entropy": "entropy of action tokens",
    "approx_kl_k3": "divergence from the policy that rolled out (k3)",
    "undecodable": "undecodable outputs",
    "faults": "simulator faults",
}
"""The same of reinforcement learning, whose rows count iterations."""
SHOWN = ("holdout_", "free_running_", "success/")


def model_card(spec: PolicySpec, statistics: Statistics, facts: Facts | None = None) -> str:
    """Markdown with the Hub's metadata block.

    Args:
        facts: `vla.card_facts`: licence, runs, evaluations, limits.
    """
    facts = facts or {}
    lines = [
        "---",
        _metadata(spec, facts),
        "---",
        "",
        f"# {spec.name}",
        "",
        *_table(("", ""), _summary(spec, statistics)),
    ]
    lines += ["", "Prompt:", "", "```", spec.prompt.template, "```", ""]
    for section in (_use(spec), _data(spec, statistics), _training(facts), _evaluation(facts), _limits(spec, statistics, facts), _made(spec)):  # fmt: skip
        lines += [*section, ""] if section else []
    lines += ["Libraries: " + ", ".join(f"{name} {number}" for name, number in spec.versions.items()), ""]
    return "\n".join(lines)


def record_run(policy: Path, run: Path, before: Facts | None = None) -> None:
    """Show in a policy's card what the training run that made it ended with, and the command.

    Args:
        before: facts of the policy that the run started from, which hold of this one too.
    """
    spec = read_spec(policy)
    facts = with_entry({**(before or {}), **read_facts(policy)}, "runs", run_facts(run, this_command()))
    statistics = json.loads((policy / "dataset_statistics.json").read_text(encoding="utf-8"))
    write_facts(policy, facts)
    write_text(policy / "README.md", model_card(spec, statistics, facts))


def is_hub_id(source: str) -> bool:
    """OWNER/NAME, and neither a path nor one of ours."""
    return source.count("/") == 1 and not source.startswith(("/", "."))


def _metadata(spec: PolicySpec, facts: Facts) -> str:
    relation = {"adapter": "adapter", "merged": "merge"}.get(spec.backbone.weights, "finetune")
    base: dict[str, Any] = {}
    if is_hub_id(spec.backbone.source):
        base = {"base_model": spec.backbone.source, "base_model_relation": relation}
    data = ModelCardData(
        license=facts.get("license") or None,
        library_name="peft" if spec.backbone.weights == "adapter" else "transformers",
        pipeline_tag="robotics",
        tags=["vla", "robotics", "vision-language-action", "action-tokens", spec.tokens.scheme],
        datasets=sorted({*facts.get("datasets", []), *_hub_datasets(spec)}) or None,
        model_name=spec.name,
        eval_results=[_eval_result(entry) for entry in facts.get("evaluations", [])] or None,
        **base,
    )
    return data.to_yaml()


def _eval_result(entry: Facts) -> EvalResult:
    tasks = ", ".join(entry["tasks"])
    return EvalResult(
        task_type="robotics", task_name="Robotics", dataset_type=entry["suite"], dataset_name=f"{entry['suite']}: {tasks}",
        metric_type="success_rate", metric_name=f"success rate ({entry['name']})", metric_value=entry["success_rate"],
    )  # fmt: skip


def _hub_datasets(spec: PolicySpec) -> list[str]:
    """Those that a stage was given by their full address."""
    given = [item for entry in spec.provenance for item in entry.get("settings", {}).get("data") or ()]
    names = [
        item.removeprefix(HUB_DATASET).split("@")[0].split("/") for item in given if str(item).startswith(HUB_DATASET)
    ]
    return ["/".join(parts[:2]) for parts in names if len(parts) >= 2]


def _summary(spec: PolicySpec, statistics: Statistics) -> list[tuple[str, str]]:
    action, image, backbone = spec.action, spec.image, spec.backbone
    packed = ", trained on the base in nf4" if backbone.quantization == "nf4" and backbone.weights == "adapter" else ""
    return [
        ("backbone", f"{backbone.source} ({backbone.model_type}), {backbone.weights} weights{packed}"),
        ("cameras", f"{', '.join(image.cameras)} at {image.size_px} px"),
        ("image path", _image_path(image)),
        ("action", f"{action.dim} dimensions ({', '.join(action.names)}), {'delta' if action.delta else 'absolute'}"),
        ("chunk", f"{action.horizon} actions, {action.control_hz:g} Hz"),
        ("gripper", action.gripper_convention or "none"),
        *_head(spec),
        *(
            [("language motions", f"{len(spec.motion.phrases)} phrases, said before the actions")]
            if spec.motion
            else []
        ),
        ("action tokens", f"{spec.tokens.scheme}, {spec.tokens.n_symbols} symbols, {spec.tokens.placement['kind']}"),
        ("statistics", ", ".join(f"`{key}`" for key in sorted(statistics))),
    ]


def _head(spec: PolicySpec) -> list[tuple[str, str]]:
    if spec.head is None:
        return []
    kind = {"l1": "actions by an L1 regression head", "discrete": "action tokens"}[spec.head.kind]
    more = [f"the state as a token ({', '.join(spec.head.state_names)})"] if spec.head.state_names else []
    more += ["FiLM in the vision transformers"] if spec.head.film else []
    return [("parallel decoding", f"OpenVLA-OFT: {'; '.join([f'{kind}, a chunk in one pass', *more])}")]


def _use(spec: PolicySpec) -> list[str]:
    return [
        "## Use", "", "This folder is a policy directory: weights, preprocessing, action tokens and statistics in one piece.",
        "", "```", "vla serve --policy OWNER/NAME", "vla eval --policy OWNER/NAME --suite SUITE --out runs/eval", "```",
    ]  # fmt: skip


def _data(spec: PolicySpec, statistics: Statistics) -> list[str]:
    rows = []
    for name, entry in sorted(statistics.items()):
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]
        counts = [entry.get(key) for key in ("num_trajectories", "num_transitions")]
        rows.append((f"`{name}`", *("not recorded" if n is None else str(n) for n in counts), f"`{digest}`"))
    heads = ("dataset", "episodes", "frames", "statistics, sha256")
    return ["## Data", "", *_table(heads, rows), "", "The statistics are in dataset_statistics.json; `vla data stats` computes them."]  # fmt: skip


def _training(facts: Facts) -> list[str]:
    lines: list[str] = []
    for run in facts.get("runs", []):
        figures, counter = run["figures"], run.get("counter", "step")  # older cards do not say what was counted
        labels = RL_LABELS if counter == "iteration" else LABELS
        extra = sorted(name for name in figures if name not in labels and name.startswith(SHOWN))
        shown = [*(name for name in labels if name in figures), *extra]
        rows = [(labels.get(name, name.replace("_", " ")), f"{figures[name]:.4g}", f"`{name}`") for name in shown]
        lines += ["", f"Run `{run['name']}`, {run['steps']} {counter}s, last values in its metrics.jsonl:", "", *_table(("figure", "value", "key"), rows)]  # fmt: skip
        lines += _command(run["command"])
    return ["## Training", *lines] if lines else []


def _evaluation(facts: Facts) -> list[str]:
    lines: list[str] = []
    for entry in facts.get("evaluations", []):
        rows = [
            _eval_row("all tasks", entry),
            *(_eval_row(name, task) for name, task in entry.get("per_task", {}).items()),
        ]
        about = [
            f"{name} {entry[name]}" for name in ("seed", "protocol", "quantization") if entry.get(name) is not None
        ]
        lines += ["", f"`{entry['name']}` on {entry['suite']}" + (f" ({', '.join(about)})" if about else "") + ":", ""]
        lines += _table(("task", "success rate", "95 % interval", "episodes", "simulator faults"), rows)
        lines += _command(entry["command"])
    return ["## Evaluation", *lines] if lines else []


def _eval_row(name: str, entry: Facts) -> tuple[str, ...]:
    if not entry["trials"]:
        return (name, "none", "none", "0", str(entry["faults"]))
    return (name, f"{entry['success_rate']:.1%}", f"{entry['low']:.1%} to {entry['high']:.1%}",
            f"{entry['successes']} of {entry['trials']}", str(entry["faults"]))  # fmt: skip


def _limits(spec: PolicySpec, statistics: Statistics, facts: Facts) -> list[str]:
    rate = f" at {spec.action.control_hz:g} Hz" if spec.action.control_hz else ""
    lines = [
        f"- Actions have the units and ranges of {', '.join(f'`{key}`' for key in sorted(statistics))}{rate}. Another robot, "
        "camera pose or control rate needs data of its own.",
    ]
    evaluations = facts.get("evaluations", [])
    if evaluations:
        suites = ", ".join(sorted({entry["suite"] for entry in evaluations}))
        lines.append(f"- Success was measured in simulation ({suites}) only, on the tasks and seeds named above.")
    else:
        lines.append("- Its success rate has not been measured; held-out loss and accuracy do not tell it.")
    check = next((entry for entry in reversed(spec.provenance) if entry["stage"] == "merge" and "adapter_on_quantized" in entry), None)  # fmt: skip
    if check is not None:
        lines.append(
            "- The adapter was trained on a base in 4 bits and merged into the unquantized one: "
            + _moved(check["adapter_on_quantized"])
        )
    return ["## Limits", "", *lines, *(f"- {sentence}" for sentence in facts.get("limits", []))]


def _moved(figures: dict[str, float]) -> str:
    if "action_change" in figures:
        return f"actions moved by up to {figures['action_change']:.2g} of their standard deviation."
    return (f"logits moved by up to {figures['logit_change']:.2g} of their standard deviation, and "
            f"{figures['same_choice']:.1%} of probe tokens stayed the same.")  # fmt: skip


def _made(spec: PolicySpec) -> list[str]:
    stages = [
        f"{i}. `{entry['stage']}`: `{json.dumps(entry['settings'])}`" for i, entry in enumerate(spec.provenance, 1)
    ]
    return ["## How it was made", "", *stages]


def _command(command: str) -> list[str]:
    return ["", "```", command, "```"] if command else []


def _table(heads: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |" if any(heads) else "|" + " |" * len(heads), "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _image_path(image: ImageSpec) -> str:
    """The steps of `vla.inputs.prepare_image` in words, in order."""
    crop = [f"centre crop of {image.crop_area:g} of the area"] if image.crop_area < 1.0 else []
    resize = [f"{image.resize_filter} to {image.size_px} px" + (", padded" if image.fit == "pad" else "")]
    steps = [f"turned {image.rotation_deg}°"] if image.rotation_deg else []
    steps += [f"JPEG {image.jpeg_quality}"] if image.jpeg_quality is not None else []
    return " → ".join(steps + (crop + resize if image.crop_order == "before_resize" else resize + crop))
