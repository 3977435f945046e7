"""Metrics where people watch them, beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. None is needed.

Each is imported only where it was asked for. metrics.jsonl is cut to the checkpoint a run resumes from; TensorBoard's curves
are too (`purge_step`); W&B keeps the first value of a step it has seen; trackio shows steps that were repeated twice.
"""

from __future__ import annotations

import importlib
from typing import Any

from vla.finetune.sft_settings import Settings
from vla.types import problem


def check_trackers(settings: Settings) -> None:
    """VlaError naming the extra of a tracker that is asked for and not installed."""
    if settings.tensorboard:
        _imported("tensorboard", "--tensorboard")
    if settings.tracker != "none":
        _imported(settings.tracker, f"--tracker {settings.tracker}")


def _imported(package: str, flag: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise problem(f"{flag} without the package {package} ({error})", f"{package} installed",
                      f"pip install 'vla-toolkit[{package}]', or drop the flag") from error  # fmt: skip


class Trackers:
    """Open ones of a run, or none. Only the main process has any."""

    def __init__(self, settings: Settings, step: int, config: dict[str, Any]) -> None:
        """`step`: where the run goes on; later points of an earlier attempt are dropped where the tracker can."""
        self._board: Any = None
        self._tracker: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(settings.out / "tensorboard"), purge_step=step + 1)
        if settings.tracker != "none":
            self._tracker = _imported(settings.tracker, f"--tracker {settings.tracker}")
            options = {"id": settings.out.name, "dir": str(settings.out)} if settings.tracker == "wandb" else {}
            self._tracker.init(
                project=settings.tracker_project, name=settings.out.name, resume="allow", config=config, **options
            )

    def log(self, row: dict[str, float]) -> None:
        """One row of metrics.jsonl."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()
