"""The README.md of a policy directory: a model card in the Hub's form, written from `policy.json` alone."""

from __future__ import annotations

import json

from vla.normalize import Statistics
from vla.spec import PolicySpec


def model_card(spec: PolicySpec, statistics: Statistics) -> str:
    """Markdown with the Hub's metadata block."""
    relation = {"adapter": "adapter", "merged": "merge"}.get(spec.backbone.weights, "finetune")
    library = "peft" if spec.backbone.weights == "adapter" else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: robotics", "tags: [vla, robotics, action-tokens]"]
    if "/" in spec.backbone.source and not spec.backbone.source.startswith(("/", ".")):
        head += [f"base_model: {spec.backbone.source}", f"base_model_relation: {relation}"]
    action, image = spec.action, spec.image
    rows = [
        ("backbone", f"{spec.backbone.source} ({spec.backbone.model_type}), {spec.backbone.weights} weights"),
        (
            "cameras",
            f"{', '.join(image.cameras)} at {image.size_px} px, {image.resize_filter}, rotated {image.rotation_deg}°",
        ),
        ("action", f"{action.dim} dimensions ({', '.join(action.names)}), {'delta' if action.delta else 'absolute'}"),
        ("chunk", f"{action.horizon} actions, {action.control_hz:g} Hz"),
        ("gripper", action.gripper_convention or "none"),
        ("action tokens", f"{spec.tokens.bins} {spec.tokens.scheme} bins, {spec.tokens.placement['kind']}"),
        ("statistics", ", ".join(f"`{key}`" for key in sorted(statistics))),
    ]
    lines = [*head, "---", "", f"# {spec.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "Prompt:", "", "```", spec.prompt.template, "```", "", "## How it was made", ""]
    lines += [
        f"{i}. `{entry['stage']}`: `{json.dumps(entry['settings'])}`" for i, entry in enumerate(spec.provenance, 1)
    ]
    lines += ["", "Libraries: " + ", ".join(f"{name} {number}" for name, number in spec.versions.items()), ""]
    return "\n".join(lines)
