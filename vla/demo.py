"""`vla demo` (`make demo`): the whole road on a real simulator, in minutes on two CPU cores.

    vla demo --out runs/demo

Expert demonstrations in Meta-World → a dataset on disk → action tokens added to the built-in VLM → LoRA fine-tuning →
evaluation → RL from sparse success → evaluation → merge → a quantized server → evaluation through HTTP → report.html.

Every stage writes into its own folder under `out` and is skipped when it is done; running the command again continues.
Demonstrations, RL and evaluation start from disjoint sets of seeds.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla.demo_report import write_demo_report
from vla.eval import run as evaluation
from vla.eval.metaworld_suite import MetaWorldSuite
from vla.eval.results import EvalResult
from vla.files import append_jsonl, read_jsonl, write_json
from vla.finetune import collect, rl, sft
from vla.merge import Settings as MergeSettings
from vla.merge import run as merge
from vla.serve.latency import measure_latency
from vla.serve.process import ServerProcess
from vla.serve.remote_policy import RemotePolicy
from vla.serve.server import Settings as ServerSettings
from vla.types import problem


@dataclass(frozen=True)
class Settings:
    """Settings of `vla demo`."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes; the report is report.html in it."""
    tasks: tuple[str, ...] = ("faucet-open", "faucet-close", "button-press", "plate-slide")
    """Meta-World tasks."""
    demos_per_task: int = 5
    """Expert demonstrations of each task."""
    max_steps: int = 20
    """Control steps per episode; the experts need 9 to 13."""
    sft_steps: int = 150
    """Optimiser steps of supervised fine-tuning."""
    rl_iterations: int = 16
    """Rollout-and-update rounds of RL."""
    eval_episodes_per_task: int = 25
    """Episodes per task in each of the three evaluations, on the same seeds."""
    quantization: Literal["int8", "nf4", "none"] = "int8"
    """Of the served policy."""
    seed: int = 0
    """Chooses demonstrations, initialisation, RL contexts and sampling noise; evaluation seeds stay the same."""
    workers: int = 2
    """Simulator processes."""
    dry_run: bool = False
    """Show the stages and what they would use, then stop."""


PRESETS = {
    "full": Settings(),
    "quick": Settings(
        out=Path("runs/demo-quick"), tasks=("faucet-open", "plate-slide"), demos_per_task=2, sft_steps=40,
        rl_iterations=1, eval_episodes_per_task=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    name: str
    run: Callable[[], Any]
    share: float
    """Part of the whole time it is expected to take, for the ETA."""


def run(settings: Settings) -> Path:
    """All stages that are not done yet; returns the report's path."""
    stages = make_stages(settings)
    if settings.dry_run:
        print(f"vla demo would write {settings.out}:")
        for stage in stages:
            print(f"  {stage.name:<34} about {stage.share:.0%} of the time")
        return settings.out / "report.html"
    _claim(settings)
    started, left = time.monotonic(), sum(stage.share for stage in stages)
    done_share = 0.0
    for number, stage in enumerate(stages, 1):
        elapsed = time.monotonic() - started
        eta = f", about {elapsed / done_share * left / 60:.0f} min left" if done_share > 0.1 else ""
        print(f"\n[{number}/{len(stages)}] {stage.name} ({elapsed / 60:.1f} min so far{eta})", flush=True)
        begun = time.monotonic()
        stage.run()
        if time.monotonic() - begun > 1.0:
            append_jsonl(settings.out / "stages.jsonl", {"stage": stage.name, "wall_s": time.monotonic() - begun})
        done_share, left = done_share + stage.share, left - stage.share
    minutes = sum(row["wall_s"] for row in read_jsonl(settings.out / "stages.jsonl")) / 60
    report = settings.out / "report.html"
    print(f"\ndone in {minutes:.1f} min of work: open {report}")
    return report


def make_stages(settings: Settings) -> list[Stage]:
    """The stages in order; each one returns at once if it is done."""
    out = settings.out
    suite = MetaWorldSuite(settings.tasks, max_steps=settings.max_steps)
    sft_policy, rl_policy, merged = out / "sft" / "policy", out / "rl" / "policy", out / "merged"

    def demonstrations() -> None:
        collect.run(
            collect.Settings(
                out / "demos", tasks=settings.tasks, episodes_per_task=settings.demos_per_task,
                first_seed=1000 * settings.seed, processes=settings.workers,
            ),
            suite,
        )  # fmt: skip

    def fine_tune() -> None:
        if not sft_policy.exists():
            preset = sft.PRESETS["tiny-demo"]
            sft.run(dataclasses.replace(
                preset, data=(str(out / "demos"),), out=out / "sft", steps=settings.sft_steps, seed=settings.seed,
                warmup_steps=min(preset.warmup_steps, settings.sft_steps // 4), eval_every_steps=max(20, settings.sft_steps // 8),
                resume=True,
            ))  # fmt: skip

    def reinforce() -> None:
        if not rl_policy.exists():
            rl.run(dataclasses.replace(
                rl.PRESETS["tiny-demo"], policy=sft_policy, out=out / "rl", tasks=settings.tasks,
                iterations=settings.rl_iterations, first_seed=100_000 + 10_000 * settings.seed, seed=settings.seed,
                workers=settings.workers, resume=True,
            ), suite)  # fmt: skip

    def evaluate(policy: Path, name: str) -> EvalResult:
        return evaluation.run(_eval_settings(settings, str(policy), out / name), suite=suite)

    def merge_adapter() -> None:
        if not merged.exists():
            merge(MergeSettings(rl_policy, merged))

    def serve_and_evaluate() -> None:
        server_settings = ServerSettings(policy=merged, port=0, quantization=settings.quantization, threads=1)
        with ServerProcess(server_settings, log=out / "server.log") as server:
            client = RemotePolicy(server.url, timeout_s=120.0)
            evaluation.run(_eval_settings(settings, "server", out / "eval-http"), policy=client, suite=suite)
            write_json(out / "latency.json", {
                "quantized": measure_latency(client, suite, n=60), "quantization": client.metadata["quantization"],
                "weight_bytes": client.metadata["weight_bytes"],
            })  # fmt: skip
            client.close()

    def report() -> None:
        write_demo_report(out, dataclasses.asdict(settings))

    return [
        Stage("expert demonstrations", demonstrations, 0.03),
        Stage("LoRA fine-tuning", fine_tune, 0.07),
        Stage("evaluate after SFT", lambda: evaluate(sft_policy, "eval-sft"), 0.04),
        Stage("RL from sparse success", reinforce, 0.74),
        Stage("evaluate after RL", lambda: evaluate(rl_policy, "eval-rl"), 0.03),
        Stage("merge the adapter", merge_adapter, 0.01),
        Stage("serve quantized, evaluate over HTTP", serve_and_evaluate, 0.07),
        Stage("report", report, 0.01),
    ]


def _eval_settings(settings: Settings, policy: str, out: Path) -> evaluation.Settings:
    return evaluation.Settings(
        policy=policy, tasks=settings.tasks, episodes_per_task=settings.eval_episodes_per_task,
        workers=settings.workers, out=out, videos_per_task=1,
    )  # fmt: skip


def _claim(settings: Settings) -> None:
    """Write settings.json, or check that the folder holds this very demo."""
    path = settings.out / "settings.json"
    mine = {
        k: v for k, v in json.loads(json.dumps(dataclasses.asdict(settings), default=str)).items() if k != "dry_run"
    }
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [f"{k} {theirs.get(k)!r} -> {v!r}" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise problem(
                f"another demo in {settings.out}: {', '.join(changed)}", "the same settings", "choose another --out"
            )
    write_json(path, mine)
