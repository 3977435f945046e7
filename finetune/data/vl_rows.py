"""What a vision-language row says: a question about an image and its answer, from the layouts that datasets come in.

| layout | fields |
| --- | --- |
| caption | `caption`: the question is `CAPTION_QUESTION` |
| questions and answers | `question`, `answer`; several answers are taken in turn |
| pointing | `points` and `question`, or `label`: the question is then "Point to LABEL." |
| conversation | `conversations` (LLaVA: from, value) or `messages` (role, content), `texts` (user, assistant) |

Of a row with several questions or answers, each time the row comes round the next one is taken. A later turn of a
conversation is asked with the turns before it.

Points are answered as Molmo writes them (Deitke et al., arXiv 2409.17146): in percent of the image's width and height from
its upper left corner, with one decimal,

    <point x="51.5" y="20.0" alt="red cup">red cup</point>
    <points x1="51.5" y1="20.0" x2="60.0" y2="33.3" alt="red cups">red cups</points>

and "There are none." for no point; without a label, `alt` and the text inside are left out. Points of a row are [x, y] in
0..1, or {"x": ..., "y": ...} in percent, as PixMo's are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla.types import VlaError, problem

CAPTION_QUESTION = "Describe the image."
NO_POINTS = "There are none."
IMAGES = ("image", "images", "img", "picture", "jpg", "png")
QUESTIONS = ("question", "query", "questions", "problem", "prompt", "instruction")
ANSWERS = ("answer", "multiple_choice_answer", "answers", "response", "solution", "output")
CAPTIONS = ("caption", "captions", "sentences", "text", "description")
TURNS = ("conversations", "messages", "conversation")
LABELS = ("label", "object", "alt")
USERS, ASSISTANTS, OTHERS = ("user", "human"), ("assistant", "gpt", "model"), ("system", "function", "tool")
Pair = tuple[str, str]
Kind = Literal["answer", "caption", "points", "turns", "texts"]


@dataclass(frozen=True)
class VlRow:
    """One question about one image."""

    pixels: Callable[[], np.ndarray]
    """Decodes the image: uint8 (height, width, 3) RGB. VlaError if it is none."""
    question: str
    answer: str


class VlSource(ABC):
    """An endless stream of rows."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def row(self, draw: int) -> VlRow:
        """The row of draw number `draw`, counted from 0. A stream that is far away is fast only where draws ascend.

        Raises:
            VlaError: a row that says no question and answer, or has no image.
        """


@dataclass(frozen=True)
class Layout:
    """Which fields of a row are what; "" for what it does not have."""

    kind: Kind
    image: str
    question: str = ""
    answer: str = ""
    """The answer, caption, points or turns."""


def guess_layout(names: Sequence[str], given: Mapping[str, str] | None = None) -> Layout | None:
    """The layout of rows with these fields; None if they say too little.

    Args:
        given: the fields that the user names, of image, question and answer; each must be one of `names`.
    """
    given = given or {}
    image = given.get("image") or _first(IMAGES, names)
    asked, told = given.get("question", ""), given.get("answer", "")
    if not image:
        return None
    question = asked or _first(QUESTIONS, names) or ""
    if told:
        kind = "turns" if told in TURNS else "points" if told == "points" else "answer" if question else "caption"
        return Layout(kind, image, question, told)
    turns = _first(TURNS, names)
    if turns and not asked:
        return Layout("turns", image, "", turns)
    if "texts" in names and not asked:
        return Layout("texts", image, "", "texts")
    if "points" in names:
        question = question or _first(LABELS, names) or ""
        return Layout("points", image, question, "points") if question else None
    answer = _first(ANSWERS, names)
    if question and answer:
        return Layout("answer", image, question, answer)
    caption = _first(CAPTIONS, names)
    return Layout("caption", image, "", caption) if caption and not asked else None


def pairs_of(row: Mapping[str, Any], layout: Layout, where: str) -> list[Pair]:
    """All questions of a row with their answers.

    Raises:
        VlaError: a row without any, with an empty text, or with points outside the image.
    """
    value = row.get(layout.answer)
    if layout.kind == "points":
        text = _text(row, layout.question, where)
        is_label = layout.question in LABELS
        label = text if is_label else next((row[n] for n in LABELS if isinstance(row.get(n), str)), "")
        found = [(f"Point to {text}." if is_label else text, points_text(_points(value, where), str(label).strip()))]
    elif layout.kind in ("turns", "texts"):
        found = _turns(_messages(value, where), where)
    else:
        question = _text(row, layout.question, where) if layout.question else CAPTION_QUESTION
        found = [(question, answer) for answer in _answers(value)]
    if not found or not all(q.strip() and a.strip() for q, a in found):
        raise _wrong(row, where)
    return [(q.strip(), a.strip()) for q, a in found]


def points_text(points: np.ndarray, label: str = "") -> str:
    """The answer for points float (n, 2) in 0..1: see the top of the file."""
    if not len(points):
        return NO_POINTS
    percent = 100.0 * points
    places = [f'x{n}="{x:.1f}" y{n}="{y:.1f}"' for n, (x, y) in enumerate(percent.tolist(), 1)]
    name, inside = "points", " ".join(places)
    if len(points) == 1:
        name, inside = "point", f'x="{percent[0, 0]:.1f}" y="{percent[0, 1]:.1f}"'
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f"<{name} {inside}" + (f' alt="{safe}"' if label else "") + f">{safe}</{name}>"


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _wrong(row: Mapping[str, Any], where: str) -> VlaError:
    shown = str(
        {name: value for name, value in row.items() if isinstance(value, str | int | float | list | type(None))}
    )
    return problem(f"{where}: {shown[:120]}", "image, question and answer, texts that are not empty", "correct the row, or leave it out")  # fmt: skip


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, list) and value:  # datasets with one list of questions and one of answers
        value = value[0]
    if not isinstance(value, str):
        raise _wrong(row, where)
    return value


def _answers(value: Any) -> list[str]:
    """Of a text, a list of texts, or of objects with a text each (VQAv2's answers); [] if it is something else."""
    if isinstance(value, Mapping):  # an object of lists, as older versions of `datasets` give them
        value = value.get("answer", value.get("text"))
    if isinstance(value, list):
        texts = [item.get("answer", item.get("text")) if isinstance(item, Mapping) else item for item in value]
        return list(dict.fromkeys(texts)) if all(isinstance(text, str) for text in texts) else []
    return [value] if isinstance(value, str) else []


def _points(value: Any, where: str) -> np.ndarray:
    """float64 (n, 2) in 0..1."""
    if isinstance(value, Mapping) and {"x", "y"} <= set(value):
        value = [{"x": x, "y": y} for x, y in zip(value["x"], value["y"], strict=True)]
    try:
        rows = [[p["x"] / 100, p["y"] / 100] if isinstance(p, Mapping) else [p[0], p[1]] for p in value]
        points = np.asarray(rows, np.float64).reshape(len(rows), 2)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise problem(f"{where}: points {str(value)[:80]}", '[[x, y], ...] in 0..1, or [{"x": ..., "y": ...}, ...] in percent',
                      "correct the row") from error  # fmt: skip
    if not ((points >= 0) & (points <= 1)).all():
        raise problem(f"{where}: points {str(value)[:80]}", "places in the image: [x, y] in 0..1, {x, y} in 0..100",
                      "divide pixels by width and height")  # fmt: skip
    return points


def _messages(value: Any, where: str) -> list[Pair]:
    """(user or assistant, text) in order."""
    found: list[Pair] = []
    for item in value if isinstance(value, list) else []:
        if not isinstance(item, Mapping):
            break
        if {"user", "assistant"} <= set(item):
            found += [("user", str(item["user"])), ("assistant", str(item["assistant"]))]
            continue
        role, content = item.get("from", item.get("role")), item.get("value", item.get("content"))
        if isinstance(content, list):
            content = " ".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        if role in OTHERS:
            continue
        if role not in (*USERS, *ASSISTANTS) or not isinstance(content, str):
            raise problem(f"{where}: {str(item)[:80]}", f"turns of {', '.join((*USERS, *ASSISTANTS))} with a text each",
                          "correct the row, or leave it out")  # fmt: skip
        found.append(("user" if role in USERS else "assistant", content.replace("<image>", "").strip()))
    return found


def _turns(messages: Sequence[Pair], where: str) -> list[Pair]:
    """Each answer with all that was said before it."""
    found = []
    for k, (role, text) in enumerate(messages):
        if role != ("user" if k % 2 == 0 else "assistant"):
            raise problem(
                f"{where}: turn {k + 1} of {role}", "user and assistant in turn", "correct the row, or leave it out"
            )
        if role == "assistant":
            found.append(("\n".join(said for _, said in messages[:k] if said), text))
    return found
