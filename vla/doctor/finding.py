"""What a check of `vla doctor` says, and the size of effect that others measured for each cause.

A finding's name is a key of `CHECKS`; pages and tables follow its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Status = Literal["pass", "suspect", "wrong", "not checked"]
STATUSES: tuple[Status, ...] = ("wrong", "suspect", "not checked", "pass")
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status
    evidence: str
    """What was seen, with numbers."""
    fix: str = ""
    """What to do about it; empty for a pass."""
    plot: bytes | None = None
    """PNG."""
    subject: str = ""
    """The dataset or suite it is about; empty: the policy alone."""

    @property
    def group(self) -> str:
        return CHECKS[self.name].group

    @property
    def effect(self) -> str:
        """What this cause did to others' success rates, with the source."""
        return CHECKS[self.name].effect

    def to_json(self) -> dict[str, Any]:
        """Everything but the plot."""
        return {
            "name": self.name, "group": self.group, "subject": self.subject, "status": self.status,
            "evidence": self.evidence, "effect": self.effect, "fix": self.fix,
        }  # fmt: skip


class Check(NamedTuple):
    """One row of `CHECKS`."""

    group: str
    effect: str


def passed(name: str, evidence: str, plot: bytes | None = None) -> Finding:
    return Finding(name, "pass", evidence, plot=plot)


def suspect(name: str, evidence: str, fix: str, plot: bytes | None = None) -> Finding:
    return Finding(name, "suspect", evidence, fix, plot)


def wrong(name: str, evidence: str, fix: str, plot: bytes | None = None) -> Finding:
    return Finding(name, "wrong", evidence, fix, plot)


def not_checked(name: str, needs: str) -> Finding:
    """`needs`: what is absent, e.g. "a dataset (--dataset FOLDER)"."""
    return Finding(name, "not checked", f"not checked: needs {needs}")


DATASET = "a dataset (--dataset FOLDER)"
SUITE = "a suite (--suite NAME)"

_PITFALLS = "vla-evaluation-harness, common pitfalls"
CHECKS: dict[str, Check] = {
    "unnorm key": Check("statistics", f"0 % until mended ({_PITFALLS}: starVLA; openvla#203, #118)"),
    "statistic kind": Check("statistics", f"q99 against min/max: 0 % until mended ({_PITFALLS}: starVLA)"),
    "dataset statistics": Check(
        "statistics",
        "a policy that kept its pre-training statistics acts at the wrong scale (openvla#87, openvla-oft#156)",
    ),
    "mask": Check(
        "statistics", "a gripper scaled like a displacement decodes to half-closed values; no published number"
    ),
    "action names": Check("statistics", "dimensions in another order: 0 %; no published number"),
    "delta or absolute": Check("actions", f"0 % ({_PITFALLS})"),
    "double delta": Check(
        "actions", "π0-FAST on LIBERO-Long 60 -> 85 % once a second delta was turned off (openpi#1047)"
    ),
    "gripper polarity": Check("actions", f"catastrophic, and a double flip hides it ({_PITFALLS})"),
    "gripper convention": Check(
        "actions", f"LIBERO: +1 closes; CALVIN and WidowX: the opposite; catastrophic ({_PITFALLS})"
    ),
    "gripper threshold": Check("actions", f"0.5, 0.7 or 0.8: 1 to 5 points ({_PITFALLS})"),
    "no-ops": Check(
        "actions", "idle frames left in LIBERO's data: the policy freezes (OpenVLA's README, no_noops data)"
    ),
    "cameras": Check("images", "a black or exchanged camera is far off distribution; no published number"),
    "image rotation": Check(
        "images", "LIBERO's cameras are upside down: far off distribution (every LIBERO client; lerobot#3830)"
    ),
    "crop": Check(
        "images", "no centre crop after training with random crops: 76.4 -> 73.3 % (vla-eval's OpenVLA report)"
    ),
    "resize filter": Check(
        "images", "JPEG, Lanczos, crop and env.seed(0) together: 71.0 -> 76.2 % (vla-eval's OpenVLA report)"
    ),
    "JPEG": Check("images", "JPEG, Lanczos, crop and env.seed(0) together: 71.0 -> 76.2 % (vla-eval's OpenVLA report)"),
    "image matters": Check("images", "an input that is dropped on the way leaves a policy that plays one motion"),
    "simulator frames": Check(
        "images",
        "MuJoCo above 3.3.2 darkens floors: OpenVLA on LIBERO-Object 88.4 -> 68 % (LIBERO#88, openvla#282, #335)",
    ),
    "state source": Check("state", f"another source of the state: X-VLA 97.8 -> 42 % ({_PITFALLS})"),
    "axis-angle": Check(
        "state",
        "antipode normalised although robosuite does not: OFT Goal 97.4 -> 83.4, Long 95.4 -> 55.8 % (vla-eval)",
    ),
    "instruction wording": Check(
        "language", "other words than in training lower success (openvla-oft#17; LIBERO-PRO tests it)"
    ),
    "instruction matters": Check(
        "language", "a policy that ignores the instruction does one task's motion in all of them"
    ),
    "prompt template": Check(
        "language",
        "OpenVLA's actions follow token 29871; another end of the prompt shifts the first token (see openvla#58)",
    ),
    "predictions": Check("predictions", "constant outputs after fine-tuning: lower the learning rate (openvla-oft#13)"),
    "token accuracy": Check("predictions", "95 % teacher-forced token accuracy and 0 % success (openvla#197)"),
    "undecodable": Check(
        "predictions", "171 of 500 LIBERO-10 episodes of π0-FAST held a malformed answer (openpi#833)"
    ),
    "chunk horizon": Check("chunks and time", f"0 to 30 points ({_PITFALLS})"),
    "replan length": Check("chunks and time", f"0 to 30 points ({_PITFALLS})"),
    "control rate": Check("chunks and time", "displacements at another rate: the robot goes too far or not far enough"),
    "protocol": Check(
        "chunks and time", "JPEG, Lanczos, crop and env.seed(0) together: 71.0 -> 76.2 % (vla-eval's OpenVLA report)"
    ),
    "max steps": Check("chunks and time", f"too few: down to 0 % ({_PITFALLS})"),
    "settle steps": Check("chunks and time", "without LIBERO's 10 settle steps the objects are still falling"),
    "success latch": Check(
        "chunks and time", f"success of the last step or of any: 29 or 75 % on one task ({_PITFALLS})"
    ),
    "seeds": Check("chunks and time", "evaluation states seen in training inflate the result (vlarl#14)"),
    "weights": Check("weights", "merged once more, or the adapter lost: 0 % (openvla-oft#137, #151)"),
    "quantization": Check("weights", "OpenVLA on BridgeData: bf16 71.3, int4 71.9, int8 58.1 % (OpenVLA paper)"),
    "temperature": Check("weights", "sampling where the published number is greedy; no published difference"),
    "library versions": Check(
        "versions", "another transformers: OFT 98.1 -> 60.2 % (openvla-oft#135); Pillow 13 resizes differently"
    ),
    "simulator versions": Check(
        "versions",
        "MuJoCo 3.1.0 -> 3.9.0: 98.1 -> 91 % (SimVLA#14); >= 3.4.0 breaks a libero_spatial task (RLinf#1460)",
    ),
    "replay success": Check(
        "replay", "what recorded actions reach through the policy's own tokens bounds every policy"
    ),
}
"""Name -> its group and effect."""
