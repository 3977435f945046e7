"""Every test runs without a network, without a display and on few threads."""

from __future__ import annotations

import os
import tempfile

# Set before torch, transformers, matplotlib or mujoco are imported; child processes inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that a second thread only waits
os.environ["MPLBACKEND"] = "Agg"
os.environ["VLA_CACHE"] = os.path.join(tempfile.gettempdir(), "vla-test-cache")  # indexes of datasets: not in the home
os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported, and `make test` sets what draws here

import vla  # noqa: E402, F401  installs the torchvision hook before any helper imports transformers
