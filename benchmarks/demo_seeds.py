"""The demo on several seeds: does RL really lift success, and by how much?

    python -m benchmarks.demo_seeds --seeds 0 1 2 3 4 --out runs/seeds

A seed changes the demonstrations, the initialisation, the RL contexts and all sampling; the evaluation's initial states
stay the same. Prints a Markdown table and the mean gain with its t interval over seeds. Continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from vla import demo
from vla.eval.statistics import mean_interval


@dataclass(frozen=True)
class Settings:
    """Which seeds, and where to."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of `vla demo`."""
    out: Path = Path("runs/seeds")
    """One folder per seed is made in it."""


def main(settings: Settings) -> None:
    rows = []
    for seed in settings.seeds:
        out = settings.out / f"seed-{seed}"
        if not (out / "summary.json").exists():
            demo.run(dataclasses.replace(demo.Settings(), out=out, seed=seed))
        rows.append((seed, json.loads((out / "summary.json").read_text())))
    print("\n| seed | after SFT | after RL | gain, paired | McNemar p | served | served - full | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for seed, summary in rows:
        rates = [_rate(entry) for entry in summary["success"].values()]
        gain, served = summary["rl_gain"], summary["quantized_minus_full"]
        print(
            f"| {seed} | {rates[0]} | {rates[1]} | {_points(gain)} | {gain['mcnemar_p']:.2g} | {rates[2]} | "
            f"{_points(served)} | {summary['minutes']:.1f} |"
        )
    gains = [summary["rl_gain"]["rate"] for _, summary in rows]
    print(f"\nRL raised success on {sum(g > 0 for g in gains)} of {len(gains)} seeds.", end=" ")
    if len(gains) > 1:
        mean = mean_interval(gains)
        print(
            f"Mean gain {100 * mean.estimate:+.1f} points, 95 % t interval {100 * mean.low:+.1f} to {100 * mean.high:+.1f}."
        )
    print(f"{rows[0][1]['episodes']} episodes per evaluation; quantization {rows[0][1]['quantization']}.")


def _rate(entry: dict[str, float]) -> str:
    return f"{100 * entry['rate']:.0f}% [{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"


def _points(entry: dict[str, float]) -> str:
    return f"{100 * entry['rate']:+.0f} [{100 * entry['low']:+.0f}, {100 * entry['high']:+.0f}]"


if __name__ == "__main__":
    main(tyro.cli(Settings))
