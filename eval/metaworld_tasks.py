"""Meta-World's fifty tasks: an instruction for each, and the benchmark's splits.

The splits are those of Yu et al. 2019 (arXiv:1910.10897) as Meta-World 3 ships them. "ml10" and "ml45" are the tasks to
train on, "-test" the five that are held out. RIPT-VLA (arXiv:2505.17016) reports on ML45's training tasks.
"""

from __future__ import annotations

# Worded after the tasks' published descriptions.
INSTRUCTIONS = {
    "button-press-topdown": "press the button from the top",
    "button-press": "press the button",
    "coffee-button": "push the button on the coffee machine",
    "dial-turn": "rotate the dial",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet clockwise",
    "faucet-open": "turn the faucet counter-clockwise",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down sideways",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-unplug-side": "unplug the peg sideways",
    "pick-place": "pick up the puck and bring it to the goal",
    "plate-slide": "slide the plate into the goal",
    "plate-slide-back": "slide the plate back",
    "plate-slide-side": "slide the plate sideways into the goal",
    "push": "push the puck to the goal",
    "reach": "reach the goal",
    "soccer": "kick the ball into the goal",
    "sweep-into": "sweep the puck into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
    # Above: the tasks of the built-in backbone's pretraining, in the order of its labels.
    "assembly": "pick up the nut and put it on the peg",
    "basketball": "dunk the ball into the basket",
    "bin-picking": "pick up the puck from one bin and put it into the other",
    "box-close": "pick up the lid and close the box with it",
    "button-press-topdown-wall": "reach over the wall and press the button from the top",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "disassemble": "take the nut off the peg",
    "hammer": "hit the nail on the wall with the hammer",
    "hand-insert": "put the hand into the hole",
    "handle-pull-side": "pull the handle up sideways",
    "peg-insert-side": "insert the peg sideways into the hole",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place-wall": "pick up the puck and bring it over the wall to the goal",
    "plate-slide-back-side": "slide the plate back sideways out of the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach-wall": "reach over the wall to the goal",
    "shelf-place": "pick up the puck and put it on the shelf",
    "stick-pull": "pick up the stick and pull the box with it",
    "stick-push": "pick up the stick and push the box with it",
    "sweep": "sweep the puck off the table",
}
N_PRETRAINED = 27
PRETRAINED_TASKS = tuple(INSTRUCTIONS)[:N_PRETRAINED]

_ML10_TRAIN = (
    "reach", "push", "pick-place", "door-open", "drawer-close", "button-press-topdown", "peg-insert-side", "window-open",
    "sweep", "basketball",
)  # fmt: skip
_ML10_TEST = ("drawer-open", "door-close", "shelf-place", "sweep-into", "lever-pull")
_ML45_TEST = ("bin-picking", "box-close", "hand-insert", "door-lock", "door-unlock")
_ML45_TRAIN = tuple(sorted(name for name in INSTRUCTIONS if name not in _ML45_TEST))

SPLITS: dict[str, tuple[str, ...]] = {
    "metaworld-ml10": _ML10_TRAIN,
    "metaworld-ml10-test": _ML10_TEST,
    "metaworld-ml45": _ML45_TRAIN,
    "metaworld-ml45-test": _ML45_TEST,
    "metaworld-mt50": tuple(sorted(INSTRUCTIONS)),
}
"""Suite name -> its tasks."""
