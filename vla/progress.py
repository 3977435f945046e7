"""Progress that a person can read in a terminal and in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0


class Progress:
    """A bar with ETA on a terminal; elsewhere, a line every ten seconds. Use as a context manager."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.done = description, total, done
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more are done; `note` is shown behind the bar."""
        self.done += n
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    _note = ""

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        eta = f"{(self.total - self.done) / rate:.0f} s" if rate > 0 else "?"
        text = f"{self.description}: {self.done}/{self.total}, {elapsed:.0f} s, ETA {eta}"
        print(f"{text}  {self._note}".rstrip(), file=sys.stderr, flush=True)
