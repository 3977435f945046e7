"""The part of `policy.json` that makes a policy say a language motion before its actions: see `vla.language_motion`."""

from __future__ import annotations

from dataclasses import dataclass

from vla.types import problem

ACTION_WORDS = "What action should the robot take to {instruction}"
MOTION_WORDS = "What motion should the robot make to {instruction}"
MAX_MOTION_CHARS = 1000


@dataclass(frozen=True)
class MotionSpec:
    """The phrases and the two queries."""

    phrases: tuple[str, ...]
    """What the policy can say, the most frequent of its data first."""
    template: str
    """The motion query's prompt, with the fields of `PromptSpec.template`."""
    joined: str = "{instruction}, with the motion: {motion}"
    """What stands for the instruction in the action query."""
    lookahead: int = 0
    """How the phrases were read off the data, so that training goes on with the same: see
    `vla.finetune.data.language_motion.MotionRule`. Steps whose movement a phrase describes; 0: as many as the horizon."""
    threshold: float = 0.25
    """From which share of its fast movement on a dimension is said."""
    words: tuple[str, ...] = ()
    """NAME=PLUS/MINUS for dimensions with words of their own."""


def check_motion(motion: MotionSpec, template: str) -> None:
    """Raise `VlaError` for a spec that contradicts itself or the prompt's template."""
    if not motion.phrases or any(not phrase or phrase != " ".join(phrase.split()) for phrase in motion.phrases):
        raise problem(f"motions {list(motion.phrases)[:4]}", "at least one phrase, single spaces between its words",
                      "correct `motion.phrases`")  # fmt: skip
    if len(set(motion.phrases)) != len(motion.phrases):
        raise problem("a motion that is listed twice", "each phrase once", "correct `motion.phrases`")
    for field in ("{instruction}", "{state}", "{history}"):
        if (field in motion.template) != (field in template):
            raise problem(f"motion template {motion.template!r}", f"the fields of the prompt's, {template!r}",
                          "correct `motion.template`")  # fmt: skip
    if "{instruction}" not in motion.joined or "{motion}" not in motion.joined:
        raise problem(f"joined {motion.joined!r}", "{instruction} and {motion} in it", "correct `motion.joined`")


def check_said(motion: str) -> None:
    """VlaError unless a motion that somebody says is one line of text."""
    if len(motion) > MAX_MOTION_CHARS or not motion.isprintable() or not motion.strip():
        raise problem(f"motion {motion[:40]!r}", f"one line of up to {MAX_MOTION_CHARS} characters, such as 'move arm up'",
                      "correct it, or leave it out")  # fmt: skip


def motion_template(template: str) -> str:
    """The motion query that goes with an action query in OpenVLA's wording.

    Raises:
        VlaError: another wording.
    """
    if ACTION_WORDS not in template:
        raise problem(f"template {template!r} with language motions", f"{ACTION_WORDS!r} in it, to turn it into the motion "
                      "query", "pass --motion-template, or drop --template")  # fmt: skip
    return template.replace(ACTION_WORDS, MOTION_WORDS)
