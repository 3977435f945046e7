"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vla.eval.html import percent_interval, signed_interval
from vla.eval.results import Comparison, EvalResult


def print_table(result: EvalResult) -> None:
    """The summary of one evaluation. Counts that are nought for every task are left out, but for time-outs and faults."""
    names = [task.name for task in result.tasks]
    tallies = [result.tally(name) for name in [*names, None]]
    columns = {
        "task": [*names, "all"],
        "success": [f"{t.successes}/{t.trials}" for t in tallies],
        "rate [95 %]": [percent_interval(t.interval) for t in tallies],
        "failures": [t.failures for t in tallies],
        "time-outs": [t.timeouts for t in tallies],
        "undecodable": [t.undecodable for t in tallies],
        "faults": [t.faults for t in tallies],
    }
    shown = {name: cells for name, cells in columns.items() if name not in ("failures", "undecodable") or any(cells)}
    table = _table(f"{result.policy} on {result.suite}", list(shown))
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(str, cells), end_section=cells[0] == names[-1])
    _print(table, [f"report: {result.out / 'report.html'}"])


def print_comparison(
    name_a: str, name_b: str, by_task: Sequence[tuple[str, Comparison]], remarks: Sequence[str]
) -> None:
    """Rates of a and b, what changed and how sure that is; the last row is all tasks pooled."""
    table = _table(f"a = {name_a}, b = {name_b}", ["task", "pairs", "a", "b", "b - a [95 %]", "only a", "only b", "p"])
    for task, c in by_task:
        cells = (c.pairs, c.successes_a, c.successes_b, signed_interval(c.gain), c.only_a, c.only_b, f"{c.p_value:.3g}")
        table.add_row(task, *map(str, cells), end_section=len(by_task) > 1 and task == by_task[-2][0])
    _print(table, remarks)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        if i == 0:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(table: Table, lines: Sequence[str]) -> None:
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
