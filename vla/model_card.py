"""The README.md of a policy directory: a model card in the Hub's form, written from `policy.json` alone."""

from __future__ import annotations

import json

from vla.normalize import Statistics
from vla.spec import ImageSpec, PolicySpec


def _image_path(image: ImageSpec) -> str:
    """The steps of `vla.inputs.prepare_image` in words, in order."""
    crop = [f"centre crop of {image.crop_area:g} of the area"] if image.crop_area < 1.0 else []
    resize = [f"{image.resize_filter} to {image.size_px} px" + (", padded" if image.fit == "pad" else "")]
    steps = [f"turned {image.rotation_deg}°"] if image.rotation_deg else []
    steps += [f"JPEG {image.jpeg_quality}"] if image.jpeg_quality is not None else []
    return " → ".join(steps + (crop + resize if image.crop_order == "before_resize" else resize + crop))


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
        ("cameras", f"{', '.join(image.cameras)} at {image.size_px} px"),
        ("image path", _image_path(image)),
        ("action", f"{action.dim} dimensions ({', '.join(action.names)}), {'delta' if action.delta else 'absolute'}"),
        ("chunk", f"{action.horizon} actions, {action.control_hz:g} Hz"),
        ("gripper", action.gripper_convention or "none"),
        ("action tokens", f"{spec.tokens.scheme}, {spec.tokens.n_symbols} symbols, {spec.tokens.placement['kind']}"),
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
