"""The doctor's report: a self-contained HTML page, a JSON file, and a table on the terminal."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vla.doctor.finding import CHECKS, STATUSES, Finding
from vla.eval.html import Html, cards, details, escaped, page, section, table

SCHEMA = "vla-doctor/1"
COLOURS = {"pass": "green", "suspect": "yellow", "wrong": "bold red", "not checked": "dim"}
_STYLE = """<style>
.finding { border-left: 4px solid var(--line); padding: 2px 0 2px 14px; margin: 0 0 18px; }
.finding p { margin: 2px 0; max-width: 90ch; overflow-wrap: anywhere; } .finding img { background: #fff; margin-top: 8px; }
.finding.wrong { border-color: var(--bad); } .finding.suspect { border-color: var(--c4); } .finding.pass { border-color: var(--good); }
.mark { font-size: .8rem; font-weight: 600; margin-left: 8px; text-transform: uppercase; color: var(--soft); }
.wrong > .mark { color: var(--bad); } .suspect > .mark { color: var(--c4); } .pass > .mark { color: var(--good); }
</style>"""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """As `CHECKS` lists them; of one check, the worst first."""
    names = list(CHECKS)
    return sorted(findings, key=lambda f: (names.index(f.name), STATUSES.index(f.status)))


def report(findings: Sequence[Finding], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of doctor.json: schema, facts (policy, datasets, suite, versions), counts, findings without plots."""
    counts = Counter(finding.status for finding in findings)
    return {
        "schema": SCHEMA, **facts, "counts": {status: counts[status] for status in STATUSES},
        "findings": [finding.to_json() for finding in in_order(findings)],
    }  # fmt: skip


def html_page(findings: Sequence[Finding], facts: Mapping[str, Any]) -> str:
    """Troubles first and unfolded, then every check by group."""
    ordered = in_order(findings)
    counts = Counter(finding.status for finding in ordered)
    troubles = sorted((f for f in ordered if f.status in ("wrong", "suspect")), key=lambda f: STATUSES.index(f.status))
    shown = Html("".join(_finding(f) for f in troubles) or "<p>Nothing wrong was found.</p>")
    groups = dict.fromkeys(f.group for f in ordered)
    rest = [
        section(group.capitalize(), *(_finding(f) for f in ordered if f.group == group and f not in troubles))
        for group in groups if any(f.group == group and f not in troubles for f in ordered)
    ]  # fmt: skip
    plain = {name: value for name, value in facts.items() if not isinstance(value, Mapping)}
    versions = dict(facts.get("versions", {}))
    return page(
        f"Doctor: {facts['policy']}",
        " · ".join(f"{name} {_text(value)}" for name, value in plain.items() if name != "policy" and value),
        Html(_STYLE + cards([(status, counts[status], "") for status in STATUSES])),
        section("Wrong and suspect", shown, note="The size of effect is what others measured for this cause, not what it costs here."),
        *rest,
        section("Versions", details("libraries and simulator", table(("name", "version"), list(versions.items())))),
    )  # fmt: skip


def print_table(findings: Sequence[Finding]) -> None:
    """One row per finding; the fix stands under the evidence of what is wrong or suspect."""
    rows = Table("check", "status", "evidence", expand=False)
    for finding in in_order(findings):
        evidence = Text(finding.evidence)
        if finding.fix:
            evidence.append(f"\nfix: {finding.fix}", style="italic")
        name = f"{finding.name} ({finding.subject})" if finding.subject else finding.name
        rows.add_row(Text(name), Text(finding.status, style=COLOURS[finding.status]), evidence)
    Console().print(rows)


def _finding(finding: Finding) -> Html:
    subject = f" · {finding.subject}" if finding.subject else ""
    parts = [
        f'<b>{escaped(finding.name + subject)}</b><span class="mark">{escaped(finding.status)}</span>',
        f"<p>{escaped(finding.evidence)}</p>",
    ]
    if finding.fix:
        parts.append(f"<p><b>Fix:</b> {escaped(finding.fix)}</p>")
    parts.append(f'<p class="soft">Effect elsewhere: {escaped(finding.effect)}</p>')
    if finding.plot is not None:
        source = "data:image/png;base64," + base64.b64encode(finding.plot).decode()
        parts.append(f'<img alt="{escaped(finding.name)}, recorded and predicted, per dimension" src="{source}">')
    return Html(f'<div class="finding {finding.status.split()[0]}">{"".join(parts)}</div>')


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
