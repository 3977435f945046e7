"""A simulator behind a pipe: how `libero_sim.py` talks when it runs in an interpreter of its own.

Standard library + numpy, Python >= 3.8. Nothing is pickled: a message is JSON and the bytes of arrays.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from typing import IO, Any, Callable  # noqa: UP035 - Python 3.8

import numpy as np


def write_message(sink: IO[bytes], header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
    """4 bytes big-endian length, JSON, then the arrays' bytes in the order of the header's `arrays`."""
    blocks = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    shapes = [[name, block.dtype.str, list(block.shape)] for name, block in blocks.items()]
    text = json.dumps({**header, "arrays": shapes}).encode()
    sink.write(struct.pack(">I", len(text)) + text)
    for block in blocks.values():
        sink.write(block.tobytes())
    sink.flush()


def read_message(source: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What `write_message` wrote; None at a clean end. EOFError if the other side stopped in the middle."""
    start = source.read(4)
    if not start:
        return None
    header = json.loads(_exactly(source, struct.unpack(">I", start)[0]))
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        n_bytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(_exactly(source, n_bytes), dtype).reshape(shape)
    return header, arrays


def _exactly(source: IO[bytes], n_bytes: int) -> bytes:
    found = source.read(n_bytes)
    if len(found) != n_bytes:
        raise EOFError(f"the message ends after {len(found)} of {n_bytes} bytes")
    return found


def serve(source: IO[bytes], sink: IO[bytes], make: Callable[..., Any], versions: Callable[[], dict[str, str]]) -> None:
    """Answer requests until the other side closes.

    {"call": "versions"}                                      -> {"versions": {...}}
    {"call": "open", "arguments": {...}}                      -> {} once `make(**arguments)` is built
    {"call": "reset", "render": bool, "seed": n, "init_state": n or null}
    {"call": "step", "render": bool} + action float64 (7,)    -> {"success": bool} + state, expert_action, image/<camera>
    {"call": "state_vector"}                                  -> {} + state_vector
    Anything that fails                                       -> {"error": name of the exception, "text": ...}
    """
    sim = None
    while True:
        message = read_message(source)
        if message is None:
            break
        request, arrays = message
        try:
            if request["call"] == "versions":
                header, reply = {"versions": versions()}, {}
            elif request["call"] == "open":
                sim = make(**request["arguments"])
                header, reply = {}, {}
            else:
                header, reply = _answer(sim, request, arrays)
        except Exception as error:  # a simulator may raise anything; the other side decides what it means
            header, reply = {"error": type(error).__name__, "text": str(error)}, {}
        write_message(sink, header, reply)
    if sim is not None:
        sim.close()


def _answer(
    sim: Any, request: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    call = request["call"]
    if sim is None:
        raise ValueError(f"the first call must be `open`, not {call!r}")
    if call == "state_vector":
        return {}, {"state_vector": sim.state_vector()}
    sim.render_frames = request["render"]
    seen = sim.reset(request["seed"], request["init_state"]) if call == "reset" else sim.step(arrays["action"])
    reply = {"state": seen.state, **{"image/" + camera: image for camera, image in seen.images.items()}}
    if seen.expert_action is not None:
        reply["expert_action"] = seen.expert_action
    return {"success": bool(seen.success)}, reply


def main(make: Callable[..., Any], versions: Callable[[], dict[str, str]]) -> None:
    """Serve on the original stdin and stdout; whatever prints or asks meanwhile gets stderr and an empty file."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: a hung simulator does not outlive its parent
    try:
        serve(source, sink, make, versions)
    except (EOFError, BrokenPipeError):
        pass  # the other side has gone
    os._exit(0)  # graphics libraries complain at an orderly exit
