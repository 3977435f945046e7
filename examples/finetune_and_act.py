"""Demonstrations, fine-tuning and one decision, in a toy simulator: about a minute on a CPU.

python -m examples.finetune_and_act
"""

import dataclasses
import tempfile
from pathlib import Path

from vla import load_policy
from vla.finetune import collect, sft
from vla.testing import FakeSuite


def main(steps: int = 20) -> None:
    folder, suite = Path(tempfile.mkdtemp()), FakeSuite()
    collect.run(collect.Settings(folder / "demos", suite="fake", episodes_per_task=3), suite)
    settings = dataclasses.replace(
        sft.PRESETS["tiny-demo"], data=(str(folder / "demos"),), out=folder / "sft", steps=steps, warmup_steps=5,
        state_low=(0.0, 0.0), state_high=(1.0, 1.0), gripper_dim=None, gripper_convention="", batch_size=8,
    )  # fmt: skip
    policy = load_policy(sft.run(settings))
    observation, _ = suite.make("reach-near").reset(seed=1000)
    chunk = policy.act([observation])[0]
    print("instruction:", observation.instruction)
    print("actions, in the simulator's units:\n", chunk.actions.round(3), "\ndecoded:", chunk.ok)


if __name__ == "__main__":
    main()
