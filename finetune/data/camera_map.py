"""Cameras by the policy's names, where each dataset has its own."""

from __future__ import annotations

from collections.abc import Sequence

from vla.finetune.formats.source import FrameSource
from vla.types import problem


def policy_name(wanted: str) -> str:
    """The policy's name in "NAME" or "NAME=KEY|KEY"."""
    return wanted.partition("=")[0]


def camera_map(wanted: Sequence[str], name: str, source: FrameSource) -> dict[str, str]:
    """The policy's camera name -> the dataset's own.

    Args:
        wanted: each "front", a camera that has this name in every dataset, or "primary=agentview|image_0": the first of
            these that the dataset has is shown to the policy as `primary`.
        name: the dataset's, for messages.

    Raises:
        VlaError: the dataset has none of them (its cameras are listed), or two of one name are wanted.
    """
    names = [policy_name(text) for text in wanted]
    if len(set(names)) < len(names) or not all(names):
        raise problem(f"cameras {', '.join(wanted)}", "different names, such as primary=agentview|image wrist",
                      "correct --cameras")  # fmt: skip
    found = {}
    for camera, text in zip(names, wanted, strict=True):
        keys = text.partition("=")[2].split("|") if "=" in text else [camera]
        known = [key for key in keys if key in source.cameras]
        if not known:
            raise problem(f"camera {' or '.join(map(repr, keys))}",
                          f"one of {', '.join(source.cameras) or 'none'}, the cameras of {name!r} ({source.where})",
                          f"choose one of these, or name it: {camera}=KEY")  # fmt: skip
        found[camera] = known[0]
    return found
