"""`vla data check`: read a whole dataset and say what is wrong with it, file by file and then in what it shows.

vla data check --data data/demos --against data/heldout
vla data check --data data/demos --json > findings.json     # for `vla data filter --drop-found findings.json`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vla.finetune.data.data_quality import Quality
from vla.finetune.data.dataset_check import Finding, check_dataset, check_source
from vla.finetune.data.dataset_lint import Limits, lint
from vla.finetune.data.gripper_lint import check_gripper
from vla.finetune.data.open_source import open_source
from vla.finetune.formats.lerobot_format import INFO_PATH
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.unfinished import check_finished
from vla.types import VlaError

SHOWN_EPISODES = 12


@dataclass(frozen=True)
class Settings:
    """Read a whole dataset and report what is wrong with it."""

    data: str
    """The dataset: a folder or file of any format."""
    against: str | None = None
    """Another dataset, e.g. the test set, that may share no episode with this one."""
    all_frames: bool = False
    """Decode every image, not only the first and the last of each episode."""
    content: bool = True
    """Look at the content too: no-ops, gripper, outliers, rate, duplicates. --no-content reads the files only."""
    gripper_closes: Literal["high", "low"] | None = None
    """Which gripper command closes the hand; compared with what the hand did, where the state shows it."""
    limits: Limits = Limits()
    """Where a check begins to complain."""
    json: bool = False
    """Print the findings as JSON."""


def run(settings: Settings) -> list[Finding]:
    """Print every finding.

    Raises:
        VlaError: if one of them is an error.
    """
    findings, quality = check(settings)
    if settings.json:
        measures = None if quality is None else asdict(quality)
        print(json.dumps({"data": settings.data, "findings": [asdict(finding) for finding in findings],
                          "quality": measures}, indent=2))  # fmt: skip
    else:
        for finding in findings:
            print(f"{finding.level}: {finding.text}{_where(finding)}")
        if quality is not None:
            print(
                f"action divergence {quality.action_divergence:.3f}, transition diversity "
                f"{quality.transition_diversity:.3f}, from {quality.n_frames} frames (0: neighbours agree, 1: they say nothing)"
            )
    n_errors = sum(finding.level == "error" for finding in findings)
    if n_errors:
        raise VlaError(f"{settings.data}: {n_errors} errors, {len(findings) - n_errors} warnings")
    if not settings.json:
        print(f"{settings.data}: no errors, {len(findings)} warnings")
    return findings


def check(settings: Settings) -> tuple[list[Finding], Quality | None]:
    """Every finding. The content is looked at only if the files can be read."""
    try:
        check_finished(Path(settings.data))
    except VlaError as error:
        return [Finding("error", str(error))], None
    if (Path(settings.data) / INFO_PATH).is_file():  # LeRobot: every file of it, not only what a reader needs
        findings, source = check_dataset(Path(settings.data), settings.all_frames), None
    else:
        source = _opened(settings.data)
        findings = [source] if isinstance(source, Finding) else check_source(source, settings.all_frames)
    if not settings.content or any(finding.level == "error" for finding in findings):
        return findings, None
    source = open_source(settings.data) if source is None or isinstance(source, Finding) else source
    report = lint(source, None if settings.against is None else open_source(settings.against), settings.limits)
    findings += report.findings
    if settings.gripper_closes is not None:
        findings += check_gripper(source, settings.gripper_closes)
    return _unique(findings), report.quality


def _opened(data: str) -> FrameSource | Finding:
    try:
        return open_source(data)
    except VlaError as error:
        return Finding("error", str(error))


def _unique(findings: Iterable[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))


def _where(finding: Finding) -> str:
    """Episodes and fix, behind the text."""
    shown = ", ".join(map(str, finding.episodes[:SHOWN_EPISODES]))
    more = f" and {len(finding.episodes) - SHOWN_EPISODES} more" if len(finding.episodes) > SHOWN_EPISODES else ""
    episodes = f"; episodes {shown}{more}" if finding.episodes else ""
    return f"{episodes}; fix: {finding.fix}" if finding.fix else episodes
