"""`libero_sim.py` in an interpreter of its own, seen from here."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vla.eval import libero_sim
from vla.eval.libero_wire import read_message, write_message
from vla.types import problem

SCRIPT = Path(libero_sim.__file__)
CLOSE_TIMEOUT_S = 5.0
TAIL_CHARACTERS = 2000

# The errors a user can mend, by name as they come over the pipe.
ERRORS = {kind.__name__: kind for kind in (libero_sim.SimulatorMissing, libero_sim.NoGraphics, libero_sim.UnknownTask)}


class SimProcess:
    """The interface of `LiberoSim`, answered by a child process. A context manager.

    Args:
        python: interpreter that has LIBERO and numpy.
        arguments: of `LiberoSim`; None starts the process without a simulator, for `versions`.

    Raises:
        VlaError: there is no such interpreter.
        SimulatorMissing, NoGraphics, UnknownTask: as `LiberoSim`.
        RuntimeError: anything else that went wrong over there, and the process's end.
    """

    def __init__(self, python: str, arguments: dict[str, Any] | None = None, *, script: Path = SCRIPT) -> None:
        self.render_frames = True
        self._said = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes]
        try:
            # -I: neither this folder nor PYTHONPATH may decide what `import libero` means there.
            self._process = subprocess.Popen(
                [python, "-I", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
            )
        except OSError as error:
            self._said.close()
            raise problem(f"{python!r} ({error.strerror})", "a Python interpreter", "correct its path") from error
        if arguments is not None:
            try:
                self._ask({"call": "open", "arguments": arguments})
            except BaseException:
                self.close()
                raise

    def versions(self) -> dict[str, str]:
        """See `libero_sim.versions`."""
        return self._ask({"call": "versions"})[0]["versions"]

    def reset(self, seed: int, init_state: int | None = None) -> libero_sim.SimObservation:
        return self._observe({"call": "reset", "seed": seed, "init_state": init_state})

    def step(self, action: np.ndarray) -> libero_sim.SimObservation:
        return self._observe({"call": "step"}, {"action": np.asarray(action, np.float64)})

    def state_vector(self) -> np.ndarray:
        return self._ask({"call": "state_vector"})[1]["state_vector"]

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()  # the end of its input is the process's sign to stop
                except BrokenPipeError:
                    pass  # it has stopped already, with something unsent
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def __enter__(self) -> SimProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _observe(
        self, request: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
    ) -> libero_sim.SimObservation:
        header, found = self._ask({**request, "render": self.render_frames}, arrays)
        images = {name.removeprefix("image/"): image for name, image in found.items() if name.startswith("image/")}
        return libero_sim.SimObservation(images, found["state"], header["success"], found.get("expert_action"))

    def _ask(
        self, request: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            write_message(self._process.stdin, request, arrays)
            answer = read_message(self._process.stdout)
        except (BrokenPipeError, EOFError):
            answer = None
        if answer is None:
            raise RuntimeError(self._epitaph())
        header = answer[0]
        if "error" in header:
            if header["error"] in ERRORS:
                raise ERRORS[header["error"]](header["text"])
            raise RuntimeError(f"{header['error']}: {header['text']}")
        return answer

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the simulator process closed its output"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()[-TAIL_CHARACTERS:]
        return f"the simulator process ended with exit code {code}" + (f": {said}" if said else "")
