"""Every test runs without a network, without a display and on few threads."""

from __future__ import annotations

import os

# Set before torch, transformers or matplotlib are imported; child processes inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"

import vla  # noqa: E402, F401  installs the torchvision hook before any helper imports transformers
