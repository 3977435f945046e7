"""One toolkit from robot demonstrations to an evaluated, served vision-language-action policy.

Importing this package is cheap: no torch, no transformers. The names below are loaded when they are first used;
everything else is imported from the module that defines it, e.g. `from vla.tokenizers.uniform import UniformTokenizer`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vla import torchvision_shim

if TYPE_CHECKING:
    from vla.policy import load_policy
    from vla.serve.client import PolicyClient
    from vla.types import ActionChunk, Observation, VlaError

__version__ = "0.1.0"

__all__ = ["ActionChunk", "Observation", "PolicyClient", "VlaError", "__version__", "load_policy"]

_HOME = {
    "ActionChunk": "vla.types",
    "Observation": "vla.types",
    "PolicyClient": "vla.serve.client",
    "VlaError": "vla.types",
    "load_policy": "vla.policy",
}

torchvision_shim.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vla' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
