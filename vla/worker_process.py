"""What runs in an environment process, and what the process inherits from its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection, parent_process
from multiprocessing.shared_memory import SharedMemory
from types import ModuleType
from typing import Any

import numpy as np

from vla.env_host import EnvFault, EnvHost, without_images
from vla.types import Suite, VlaError


@contextmanager
def spawn_surroundings(suite: Suite) -> Iterator[None]:
    """What a spawned worker inherits: one thread per maths library, off-screen GL, and not our main program.

    multiprocessing imports the parent's main module in the child, which would load the model's libraries there, or run a
    script that has no `if __name__ == "__main__"`. Only a suite that is defined in the main module needs it.
    """
    wanted = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # Mesa's software renderer: in its own thread only, or it takes the policy's cores. Hardware drivers ignore it.
    wanted["LP_NUM_THREADS"] = os.environ.get("LP_NUM_THREADS", "0")
    wanted["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl")
    before = {name: os.environ.get(name) for name in wanted}
    main = sys.modules["__main__"]
    os.environ.update(wanted)
    if type(suite).__module__ != "__main__":
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(pipe: Any, suite: Suite, max_idle_envs: int) -> None:
    """The process's main function. Ctrl-C is the parent's business; if the parent dies, so does this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    host = EnvHost(suite, max_idle_envs)
    blocks: dict[int, SharedMemory] = {}
    pipe.send(("ready", None))
    try:
        while (message := pipe.recv()) is not None:
            pipe.send(_answer(host, suite, blocks, *message))
        host.close()
    except (EOFError, BrokenPipeError):
        pass  # the parent has gone
    sys.stdout.flush()
    os._exit(0)  # GL libraries complain at an orderly exit


def _answer(
    host: EnvHost, suite: Suite, blocks: dict[int, SharedMemory], what: str, slot: int, name: str, *args: Any
) -> Any:
    try:
        reply = host.reset(slot, *args) if what == "reset" else host.run_chunk(slot, *args)
    except EnvFault as fault:
        return "fault", str(fault)
    except VlaError as error:
        return "user_error", str(error)
    if slot not in blocks or blocks[slot].name != name:
        blocks[slot] = SharedMemory(name)
    images = [reply.observation.images[camera] for camera in suite.cameras] if reply.observation.images else []
    pictures = images + reply.frames
    view = view_images(blocks[slot], len(pictures), suite.image_size_px)
    for i, picture in enumerate(pictures):
        view[i] = picture
    slim = replace(reply, observation=without_images(reply.observation), frames=[])
    return "ok", (slim, bool(images), len(reply.frames))


def view_images(block: SharedMemory, n: int, size_px: int) -> np.ndarray:
    """The first n images of a block, uint8 (n, size_px, size_px, 3), in place."""
    return np.ndarray((n, size_px, size_px, 3), np.uint8, buffer=block.buf)


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
