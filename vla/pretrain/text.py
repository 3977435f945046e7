"""Questions and answers about one picture, made from its facts (`vla.pretrain.data.FACTS`).

Numbers are integers 0..255, each one token:

- a position is x y z over the workspace (`WORKSPACE_M`), cut into 256 equal cells;
- a relative position is dx dy dz in steps of 2 mm, 128 = no difference, clipped at about 25 cm;
- a pixel is u v over the picture's width and height;
- a state is a position and the finger opening, as `vla.inputs.state_text` writes it with the bounds of `STATE_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla.eval.metaworld_tasks import INSTRUCTIONS
from vla.pretrain.data import COLOURS, FACTS, IMAGE_SIZE_PX, NO_COLOUR, TASKS, WORKSPACE_M

RELATIVE_STEP_M = 0.002
STATE_LOW = (*WORKSPACE_M[0].tolist(), 0.0)
STATE_HIGH = (*WORKSPACE_M[1].tolist(), 1.0)
LEVEL_M = 0.015  # a smaller difference along an axis is "level"
AXES = (("left", "right"), ("back", "forward"), ("down", "up"))  # seen from the robot: -x +x, -y +y, -z +z

# What stands on the table, which part of it is touched, what can be done with it.
_DOOR = ("door", "door handle", "open or close the door")
_LOCK = ("door", "lock", "lock or unlock the door")
_DRAWER = ("drawer", "drawer handle", "open or close the drawer")
_FAUCET = ("faucet", "faucet handle", "turn the faucet clockwise or counter-clockwise")
_WINDOW = ("window", "window handle", "open or close the window")
_BUTTON = ("button box", "button", "press the button")
_HANDLE = ("handle box", "handle", "press the handle down or pull the handle up")
_PLATE = ("plate", "plate", "slide the plate")
_PUCK = ("puck", "puck", "push the puck, pick up the puck or reach the goal")
SCENES: dict[str, tuple[str, str, str]] = {
    "button-press-topdown": _BUTTON,
    "button-press": _BUTTON,
    "coffee-button": ("coffee machine", "button", "push the button on the coffee machine"),
    "dial-turn": ("dial", "dial", "rotate the dial"),
    "door-close": _DOOR,
    "door-lock": _LOCK,
    "door-open": _DOOR,
    "door-unlock": _LOCK,
    "drawer-close": _DRAWER,
    "drawer-open": _DRAWER,
    "faucet-close": _FAUCET,
    "faucet-open": _FAUCET,
    "handle-press": _HANDLE,
    "handle-press-side": _HANDLE,
    "handle-pull": _HANDLE,
    "lever-pull": ("lever", "lever", "pull the lever up"),
    "peg-unplug-side": ("peg", "peg", "unplug the peg sideways"),
    "pick-place": _PUCK,
    "plate-slide": _PLATE,
    "plate-slide-back": _PLATE,
    "plate-slide-side": _PLATE,
    "push": _PUCK,
    "reach": _PUCK,
    "soccer": ("ball", "ball", "kick the ball into the goal"),
    "sweep-into": ("puck", "puck", "sweep the puck into the hole"),
    "window-close": _WINDOW,
    "window-open": _WINDOW,
}
OBJECTS = tuple(sorted({scene[0] for scene in SCENES.values()}))
CLOSED_AT = {"drawer": 1.0, "door": 1.0, "window": 0.0}  # end of the joint's range at which these are closed


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    kind: str
    question: str
    answer: str


def position_bins(point_m: np.ndarray) -> np.ndarray:
    """int (3,) 0..255: the cell of the workspace."""
    share = (np.asarray(point_m, np.float64) - WORKSPACE_M[0]) / (WORKSPACE_M[1] - WORKSPACE_M[0])
    return np.clip(np.floor(share * 256), 0, 255).astype(int)


def relative_bins(offset_m: np.ndarray) -> np.ndarray:
    """int (3,) 0..255; 128 is no difference."""
    return np.clip(np.round(np.asarray(offset_m, np.float64) / RELATIVE_STEP_M) + 128, 0, 255).astype(int)


def pixel_bins(pixel: np.ndarray) -> np.ndarray:
    """int (2,) 0..255 over the picture; points outside are put on its edge."""
    return np.clip(np.floor(np.asarray(pixel, np.float64) * 256 / IMAGE_SIZE_PX), 0, 255).astype(int)


def state_bins(fact: np.ndarray) -> np.ndarray:
    """int (4,) 0..255: hand position and finger opening."""
    return np.append(position_bins(fact["hand"]), int(np.clip(np.floor(fact["opening"] * 256), 0, 255)))


def numbers(values: np.ndarray) -> str:
    return " ".join(str(int(value)) for value in values)


def directions(offset_m: np.ndarray) -> str:
    """One word per axis, e.g. `left forward level`."""
    words = ["level" if abs(d) < LEVEL_M else names[int(d > 0)] for d, names in zip(offset_m, AXES, strict=True)]
    return " ".join(words)


def make_turns(fact: np.ndarray, rng: np.random.Generator, n_turns: int) -> list[Turn]:
    """`n_turns` different questions that fit this picture, the position questions most often."""
    kinds = [kind for kind in KINDS if kind not in ONLY_IF or ONLY_IF[kind](fact)]
    weights = np.array([KINDS[kind][0] for kind in kinds])
    chosen = rng.choice(len(kinds), size=min(n_turns, len(kinds)), replace=False, p=weights / weights.sum())
    return [make_turn(kinds[i], fact, rng) for i in chosen]


def make_turn(kind: str, fact: np.ndarray, rng: np.random.Generator) -> Turn:
    question, answer = KINDS[kind][1](fact, rng)
    return Turn(kind, question, answer)


def random_facts(n: int, seed: int) -> np.ndarray:
    """`FACTS` (n,) that belong to no picture: enough to see every word the questions can hold."""
    rng = np.random.default_rng(seed)
    facts = np.zeros(n, FACTS)
    facts["task"] = rng.integers(len(TASKS), size=n)
    for name in ("hand", "part", "goal"):
        facts[name] = rng.uniform(WORKSPACE_M[0], WORKSPACE_M[1], size=(n, 3))
        facts[f"{name}_px"] = rng.uniform(0, IMAGE_SIZE_PX, size=(n, 2))
    facts["opening"], facts["joint"] = rng.random((2, n))
    facts["colour"], facts["table_colour"] = rng.integers(NO_COLOUR, len(COLOURS), size=(2, n))
    return facts


def _names(fact: np.ndarray) -> tuple[str, str, str]:
    return SCENES[TASKS[fact["task"]]]


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return str(choices[rng.integers(len(choices))])


def _state(fact: np.ndarray, rng: np.random.Generator, share: float = 0.5) -> str:
    return f"State: {numbers(state_bins(fact))}. " if rng.random() < share else ""


def _part_relative(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    part = _names(fact)[1]
    ask = _pick(rng, f"Where is the {part} relative to the gripper?", f"Position of the {part} from the gripper?",
                f"How far must the gripper move to the {part}?")  # fmt: skip
    return _state(fact, rng) + ask, numbers(relative_bins(fact["part"] - fact["hand"]))


def _instruction_relative(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Where the hand has to go first: the thing to touch, or the goal if the task is to reach it."""
    task = TASKS[fact["task"]]
    target = fact["goal"] if task == "reach" else fact["part"]
    do = INSTRUCTIONS[task]
    ask = _pick(rng, f"The robot should {do}. Where is the thing to touch, relative to the gripper?",
                f"Task: {do}. Where should the gripper go?",
                f"What action should the robot take to {do}?",
                f"In: What action should the robot take to {do}?\nOut:")  # fmt: skip
    return _state(fact, rng, 0.6) + ask, numbers(relative_bins(target - fact["hand"]))


def _goal_relative(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    do, part = INSTRUCTIONS[TASKS[fact["task"]]], _names(fact)[1]
    if rng.random() < 0.5:
        ask = f"The robot should {do}. Where is the goal relative to the gripper?"
        return _state(fact, rng) + ask, numbers(relative_bins(fact["goal"] - fact["hand"]))
    ask = f"The robot should {do}. Where must the {part} go, relative to where it is?"
    return ask, numbers(relative_bins(fact["goal"] - fact["part"]))


def _hand_position(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, "Where is the gripper?", "Position of the gripper?"), numbers(position_bins(fact["hand"]))


def _part_position(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    part = _names(fact)[1]
    return _pick(rng, f"Where is the {part}?", f"Position of the {part}?"), numbers(position_bins(fact["part"]))


def _goal_position(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    do = INSTRUCTIONS[TASKS[fact["task"]]]
    ask = _pick(rng, f"The robot should {do}. Where is the goal?", f"Task: {do}. Position of the goal?")
    return ask, numbers(position_bins(fact["goal"]))


def _part_pixel(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    part = _names(fact)[1]
    ask = _pick(rng, f"Where is the {part} in the picture?", f"Point to the {part}.")
    return ask, numbers(pixel_bins(fact["part_px"]))


def _hand_pixel(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    ask = _pick(rng, "Where is the gripper in the picture?", "Point to the gripper.")
    return ask, numbers(pixel_bins(fact["hand_px"]))


def _direction(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    part = _names(fact)[1]
    ask = _pick(rng, f"Which way is the {part} from the gripper?", f"Which way must the gripper move to the {part}?")
    return _state(fact, rng, 0.3) + ask, directions(fact["part"] - fact["hand"])


def _goal_direction(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    do, part = INSTRUCTIONS[TASKS[fact["task"]]], _names(fact)[1]
    return f"The robot should {do}. Which way must the {part} move?", directions(fact["goal"] - fact["part"])


def _distance(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    ask = f"How many centimetres is the gripper from the {_names(fact)[1]}?"
    return _state(fact, rng, 0.3) + ask, str(int(np.rint(100 * np.linalg.norm(fact["part"] - fact["hand"]))))


def _object(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, "What is on the table?", "Which object can you see?"), f"a {_names(fact)[0]}"


def _ability(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, "What can the robot do here?", "Name a task for the robot."), _names(fact)[2]


def _colour(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    ask = _pick(rng, f"What colour is the {_names(fact)[0]}?", f"Colour of the {_names(fact)[0]}?")
    return ask, list(COLOURS)[fact["colour"]]


def _table_colour(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    answer = "wood" if fact["table_colour"] == NO_COLOUR else list(COLOURS)[fact["table_colour"]]
    return "What colour is the table?", answer


def _gripper(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    answer = "open" if fact["opening"] > 0.6 else "closed"
    return _pick(rng, "Is the gripper open or closed?", "How are the fingers?"), answer


def _relation(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    axis, side = (int(i) for i in rng.integers([3, 2]))
    word = (("left of", "right of"), ("behind", "in front of"), ("below", "above"))[axis][side]
    offset = (fact["hand"] - fact["part"])[axis] * (1 if side else -1)
    return f"Is the gripper {word} the {_names(fact)[1]}?", "yes" if offset > 0 else "no"


def _exists(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    here = _names(fact)[0]
    name = here if rng.random() < 0.5 else _pick(rng, *[name for name in OBJECTS if name != here])
    return f"Is there a {name}?", "yes" if name == here else "no"


def _near(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    near = np.linalg.norm(fact["part"] - fact["hand"]) < 0.08
    return f"Is the gripper near the {_names(fact)[1]}?", "yes" if near else "no"


def _opened(fact: np.ndarray) -> float:
    """How far the drawer, door or window is open, 0..1."""
    return abs(CLOSED_AT[_names(fact)[0]] - float(fact["joint"]))


def _is_open(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    return f"Is the {_names(fact)[0]} open or closed?", "open" if _opened(fact) > 0.3 else "closed"


def _percent(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    return f"How many percent is the {_names(fact)[0]} open?", str(int(np.rint(100 * _opened(fact)).clip(0, 100)))


def _caption(fact: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    thing, part, _ = _names(fact)
    colour = "" if fact["colour"] == NO_COLOUR else list(COLOURS)[fact["colour"]] + " "
    way = directions(fact["part"] - fact["hand"])
    answer = f"A robot and a {colour}{thing}. The gripper is {_gripper(fact, rng)[1]}; the {part} is {way} from it."
    return _pick(rng, "Describe the picture.", "What do you see?"), answer


_Maker = Callable[[np.ndarray, np.random.Generator], tuple[str, str]]
KINDS: dict[str, tuple[float, _Maker]] = {
    "part_relative": (3.0, _part_relative),
    "instruction_relative": (4.0, _instruction_relative),
    "goal_relative": (1.5, _goal_relative),
    "hand_position": (1.0, _hand_position),
    "part_position": (1.5, _part_position),
    "goal_position": (0.7, _goal_position),
    "part_pixel": (1.0, _part_pixel),
    "hand_pixel": (0.7, _hand_pixel),
    "direction": (1.0, _direction),
    "goal_direction": (0.7, _goal_direction),
    "distance": (0.6, _distance),
    "object": (0.4, _object),
    "ability": (0.3, _ability),
    "colour": (0.8, _colour),
    "table_colour": (0.3, _table_colour),
    "gripper": (0.4, _gripper),
    "relation": (0.6, _relation),
    "exists": (0.3, _exists),
    "near": (0.3, _near),
    "is_open": (0.4, _is_open),
    "percent": (0.4, _percent),
    "caption": (0.3, _caption),
}
ONLY_IF: dict[str, Callable[[np.ndarray], bool]] = {
    "colour": lambda fact: bool(fact["colour"] != NO_COLOUR),
    "gripper": lambda fact: not 0.5 < fact["opening"] < 0.7,
    "is_open": lambda fact: TASKS[fact["task"]].startswith(("drawer", "door-open", "door-close", "window")),
    "percent": lambda fact: TASKS[fact["task"]].startswith(("drawer", "door-open", "door-close", "window")),
}
