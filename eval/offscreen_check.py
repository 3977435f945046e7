"""Finds a MuJoCo back end that draws without a display, by drawing with it.

    python -m vla.eval.offscreen_check

prints `egl`, `osmesa` or `cgl` (a value for `MUJOCO_GL`) and exits with 0, or says what to install and exits with 1.
Each back end is tried in a process of its own: MuJoCo reads `MUJOCO_GL` once, and a broken driver may abort the process.
"""

from __future__ import annotations

import os
import subprocess
import sys

DEBIAN_PACKAGES = ("libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libgl1")
TIMEOUT_S = 120

_DRAW = """
import os
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><light pos="0 0 3"/><geom type="sphere" size="1" rgba="1 0 0 1"/></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 32, 32)
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the picture is black"
    print("drawn", flush=True)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)  # drivers may complain or crash while they are taken down: that says nothing about drawing
"""


def draws(backend: str) -> str | None:
    """None if `backend` draws a picture here, else its complaint."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)  # mujoco sets it; a value from elsewhere contradicts MUJOCO_GL
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no picture within {TIMEOUT_S} s"
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if lines[-1] == "drawn" else lines[-1]


def candidates() -> tuple[str, ...]:
    """Back ends to try: the user's own choice alone, if there is one."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen:
        return (chosen,)
    return ("cgl",) if sys.platform == "darwin" else ("egl", "osmesa")


def main() -> int:
    complaints = []
    for backend in candidates():
        complaint = draws(backend)
        if complaint is None:
            print(backend)
            return 0
        complaints.append(f"  MUJOCO_GL={backend}: {complaint}")
    print("error: MuJoCo cannot draw without a display here:", *complaints, sep="\n", file=sys.stderr)
    print(f"fix (Debian, Ubuntu): apt-get install {' '.join(DEBIAN_PACKAGES)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
