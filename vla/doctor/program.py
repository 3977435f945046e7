"""`vla doctor`: why a policy does worse than it should. One page of mechanical checks.

    vla doctor runs/sft/policy --dataset data/demos --suite metaworld

Each known cause of a low or zero success rate is a check that says pass, suspect or wrong, with the evidence, the size of
effect that others measured, and the fix. What needs a dataset or a simulator that was not given is listed as not checked.
Nothing is changed: the policy is read, asked about some frames of the data, and compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vla.doctor.actions import (
    check_delta,
    check_double_delta,
    check_gripper_convention,
    check_gripper_polarity,
    check_gripper_threshold,
    check_noops,
)
from vla.doctor.evidence import DataView, Predictions, lacking, n_passes, predict, view
from vla.doctor.finding import CHECKS, DATASET, Finding, not_checked
from vla.doctor.images import (
    check_cameras,
    check_crop,
    check_filter,
    check_image_matters,
    check_jpeg,
    check_rotation,
    check_simulator_frames,
)
from vla.doctor.inputs import (
    check_axis_angle,
    check_instruction_matters,
    check_instructions,
    check_prompt,
    check_state_source,
)
from vla.doctor.page import html_page, print_table, report
from vla.doctor.predictions import check_predictions, check_token_accuracy, check_undecodable, l1_by_step
from vla.doctor.protocol import (
    check_control_rate,
    check_horizon,
    check_max_steps,
    check_protocol,
    check_replan,
    check_replay,
    check_seeds,
    check_settle_steps,
    check_success_latch,
)
from vla.doctor.statistics import (
    check_action_names,
    check_dataset_statistics,
    check_mask,
    check_statistic_kind,
    check_unnorm_key,
)
from vla.doctor.suite import first_observations, replay_success, settle_steps
from vla.doctor.weights import (
    check_libraries,
    check_quantization,
    check_simulator,
    check_temperature,
    check_weights,
    largest_update,
    parent_agreement,
    trained_with,
)
from vla.eval.suites import get_suite
from vla.files import write_json, write_text
from vla.finetune.data.statistics import dataset_statistics
from vla.finetune.formats.lerobot_reader import LeRobotReader
from vla.finetune.formats.unfinished import check_finished
from vla.libero_protocol import disagreements, get_protocol
from vla.policy import LocalPolicy, load_policy
from vla.policy_files import library_versions
from vla.progress import Progress
from vla.types import Suite, VlaError, problem

JSON_FILE = "doctor.json"


@dataclass(frozen=True)
class Settings:
    """Check a policy directory for every known cause of a low success rate."""

    policy: tyro.conf.Positional[str]
    """Policy directory."""
    suite: str = ""
    """Simulator suite the policy is evaluated on; not given: what needs one is not checked."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; none given: the suite's own choice."""
    dataset: tuple[Path, ...] = ()
    """LeRobot v3.0 dataset folders, best the ones it was trained on; none given: what needs one is not checked."""
    protocol: str = ""
    """Published LIBERO protocol to compare the policy with: openvla, oft, openpi or lerobot; not given: none."""
    unnorm_key: str | None = None
    """Whose statistics un-normalise the actions; default: the policy's own."""
    n_execute: int | None = None
    """Actions of each chunk that the evaluation executes; default: the whole chunk."""
    temperature: float = 0.0
    """Sampling temperature of the evaluation. The checks themselves ask greedily."""
    quantization: str = "none"
    """none, int8 or nf4."""
    frames: int = 64
    """Frames to ask the policy about, spread over the datasets."""
    resets: int = 3
    """Simulator resets whose first frame and state are compared."""
    replays: int = 5
    """Recorded episodes to replay in the simulator; 0: none."""
    workers: int = 1
    """Simulator processes of the replay; 0 runs it in this process."""
    device: str = "cpu"
    """Where the policy is loaded."""
    dtype: str = "float32"
    """In which precision the policy is loaded."""
    strict: bool = False
    """Exit with code 2 if anything is wrong."""
    out: Path = Path("runs/doctor/report.html")
    """Page to write; doctor.json goes beside it."""
    dry_run: bool = False
    """List the checks, then stop."""

    def __post_init__(self) -> None:
        if self.frames < 2 or self.resets < 1 or self.replays < 0 or self.workers < 0:
            raise problem(f"frames {self.frames}, resets {self.resets}, replays {self.replays}, workers {self.workers}",
                          "frames >= 2, resets >= 1, replays >= 0, workers >= 0", "correct them")  # fmt: skip


def run(settings: Settings, *, suite: Suite | None = None) -> list[Finding]:
    """Check, print the table, write the page and doctor.json; returns the findings.

    Args:
        suite: to use instead of `settings.suite`.

    Raises:
        VlaError: a policy, dataset or suite that cannot be opened; with `strict`, anything wrong.
    """
    if settings.dry_run:
        print("\n".join(f"{check.group}: {name} ({check.effect})" for name, check in CHECKS.items()))
        return []
    if not Path(settings.policy).is_dir():
        raise problem(f"policy {settings.policy!r}", "a policy directory (an endpoint's files cannot be read)",
                      "correct the path")  # fmt: skip
    suite = suite or (get_suite(settings.suite, settings.tasks) if settings.suite else None)
    for root in settings.dataset:
        check_finished(root)
    readers = [LeRobotReader(root) for root in settings.dataset]
    policy = load_policy(
        settings.policy, device=settings.device, dtype=settings.dtype, quantization=settings.quantization,
        unnorm_key=settings.unnorm_key,
    )  # fmt: skip
    findings = diagnose(settings, policy, readers, suite)
    facts = {
        "policy": settings.policy, "datasets": [str(root) for root in settings.dataset], "suite": suite.name if suite else None,
        "frames": settings.frames, "versions": {**library_versions(), **(suite.versions() if suite else {})},
    }  # fmt: skip
    write_text(settings.out, html_page(findings, facts))
    write_json(settings.out.parent / JSON_FILE, report(findings, facts))
    print_table(findings)
    print(f"report: {settings.out}")
    bad = list(dict.fromkeys(finding.name for finding in findings if finding.status == "wrong"))
    if settings.strict and bad:
        raise VlaError(f"{len(bad)} checks say wrong: {', '.join(bad)}; the fixes are in {settings.out}")
    return findings


def diagnose(
    settings: Settings, policy: LocalPolicy, readers: Sequence[LeRobotReader], suite: Suite | None
) -> list[Finding]:
    """Every check, in no particular order."""
    views = [view(reader) for reader in readers]
    findings = _policy_findings(settings, policy)
    names = [data.name for data in views]
    per_dataset = -(-settings.frames // max(1, len(readers)))
    with Progress("frames", per_dataset * n_passes(policy) * max(1, len(readers))) as progress:
        for reader, data in zip(readers, views, strict=True):
            several = policy.unnorm_key in names and data.name in policy.statistics
            key = data.name if several else policy.unnorm_key
            needs = lacking(policy, data)
            predictions = None if needs else predict(policy, reader, per_dataset, key, progress.advance)
            found = _data_findings(settings, policy, data, _recomputed(policy, reader), predictions, key, suite)
            found = [_explained(finding, needs) for finding in found]
            findings += [dataclasses.replace(finding, subject=data.name) for finding in found]
    if not readers:
        findings += _data_findings(settings, policy, None, None, None, policy.unnorm_key, suite)
    if suite is not None:
        found = _suite_findings(settings, policy, readers, views, suite)
        findings += [dataclasses.replace(finding, subject=suite.name) for finding in found]
    else:
        findings += [
            check_simulator_frames(None), check_replay(None, 0), check_simulator(None, {}, None),
            check_settle_steps(None, None), check_max_steps(None, (), None), check_instructions(policy.spec.prompt, None, None),
        ]  # fmt: skip
    return findings


def _policy_findings(settings: Settings, policy: LocalPolicy) -> list[Finding]:
    """What needs neither data nor simulator."""
    spec, folder = policy.spec, Path(settings.policy)
    template, differences = trained_with(spec.provenance, "finetune", "template"), None
    if settings.protocol:  # whether frames come turned already is for `image rotation` to find out
        turned = spec.image.rotation_deg == 0
        differences = disagreements(get_protocol(settings.protocol), spec.action, spec.image, frames_turned=turned)
    return [
        check_weights(spec.backbone.weights, largest_update(folder), parent_agreement(policy)),
        check_quantization(policy.quantization),
        check_temperature(settings.temperature, spec.temperature),
        check_libraries(spec.versions, library_versions()),
        check_prompt(spec.prompt, template if isinstance(template, str) else None, spec.backbone.source),
        check_mask(spec.action, policy.statistics[policy.unnorm_key]["action"]),
        check_protocol(settings.protocol, differences),
    ]


def _data_findings(
    settings: Settings, policy: LocalPolicy, data: DataView | None, recomputed: dict[str, Any] | None,
    predictions: Predictions | None, key: str, suite: Suite | None,
) -> list[Finding]:  # fmt: skip
    """Everything about one dataset; with None, what is missing."""
    spec, statistics = policy.spec, policy.statistics
    entry, proprio = statistics[key]["action"], statistics[key].get("proprio")
    rows = data.actions if data is not None and data.actions.shape[1] == spec.action.dim else None
    recorded = ("horizon", "crop_area", "rotation_deg")
    horizon, crop, turn = (trained_with(spec.provenance, "finetune", name) for name in recorded)
    return [
        check_unnorm_key(statistics, key, data.name if data else None, recomputed),
        check_statistic_kind(entry, rows),
        check_dataset_statistics(entry, recomputed["action"] if recomputed else None, spec.action.names),
        check_action_names(spec.action, data.action_names if data else None, data.name if data else ""),
        check_delta(spec.action, data),
        check_double_delta(spec.action, data),
        check_noops(spec.action, data),
        check_gripper_polarity(spec.action, predictions),
        check_gripper_convention(spec.action, data, suite.name if suite else None),
        check_gripper_threshold(spec.action, predictions),
        check_cameras(spec.image, data.cameras if data else None, tuple(suite.cameras) if suite else None, predictions),
        check_rotation(spec.image, turn if isinstance(turn, int) else None, predictions),
        check_crop(spec.image, float(crop) if isinstance(crop, int | float) else None, predictions),
        check_filter(spec.image, predictions),
        check_jpeg(spec.image, predictions),
        check_image_matters(predictions),
        check_state_source(
            spec.prompt, proprio, data.state_names if data else None, data.states if data else None, data.name if data else ""
        ),
        check_axis_angle(spec.prompt, proprio, data),
        check_instruction_matters(predictions),
        check_predictions(predictions),
        check_token_accuracy(predictions),
        check_undecodable(predictions),
        check_horizon(spec.action.horizon, horizon if isinstance(horizon, int) else None, data),
        check_replan(spec.action.horizon, settings.n_execute, None if predictions is None else l1_by_step(predictions)),
        check_control_rate(spec.action.control_hz, data, suite.control_hz if suite else None),
        check_success_latch(data),
        check_seeds(data),
    ]  # fmt: skip


def _suite_findings(
    settings: Settings, policy: LocalPolicy, readers: Sequence[LeRobotReader], views: Sequence[DataView], suite: Suite
) -> list[Finding]:
    """Everything about the simulator, against the first dataset."""
    spec, data = policy.spec, views[0] if views else None
    first = first_observations(suite, readers[0] if readers else None, settings.resets)
    proprio = policy.statistics[policy.unnorm_key].get("proprio")
    replayed = (None, 0, "--replays above 0")
    if settings.replays:
        replayed = replay_success(policy, suite, readers, settings.replays, settings.workers)
    instructions = list(dict.fromkeys(text for view_ in views for text in view_.instructions)) or None
    return [
        check_action_names(spec.action, tuple(suite.action_names), suite.name),
        check_state_source(spec.prompt, proprio, tuple(suite.state_names), first.states, suite.name),
        check_simulator_frames(first.pairs, first.needs),
        check_instructions(spec.prompt, instructions, [task.instruction for task in suite.tasks]),
        check_max_steps(suite.name, suite.tasks, data),
        check_settle_steps(suite.name, settle_steps(suite)),
        check_simulator(suite.name, spec.versions, suite.versions()),
        check_replay(*replayed),
    ]


def _recomputed(policy: LocalPolicy, reader: LeRobotReader) -> dict[str, Any] | None:
    """The dataset's own statistics, exactly, if its actions have the policy's size."""
    if reader.action_dim != policy.spec.action.dim:
        return None
    return dataset_statistics(reader, gripper_dim=policy.spec.action.gripper_dim)


def _explained(finding: Finding, needs: str | None) -> Finding:
    """A check that was skipped although a dataset was given says why."""
    if needs and finding.status == "not checked" and DATASET in finding.evidence:
        return not_checked(finding.name, needs)
    return finding
