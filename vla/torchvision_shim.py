"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

The torchvision wheel on the public package index is built for CUDA. Beside a CPU-only torch its compiled operators do
not load, and `import torchvision` then ends in `RuntimeError: operator torchvision::nms does not exist`. That takes
timm and nearly every transformers processor with it, under error messages that hide the cause.

`install` adds an import hook that, just before torchvision's own code runs, declares the operators torchvision expects to
find (their names and signatures only). Nothing is declared when torch has CUDA or ROCm, or when torchvision is a CPU
build: there the real operators load and must not be declared twice.

What works afterwards: `torchvision.transforms`, `torchvision.models`, timm, transformers. What still does not, and says
so when called: `torchvision.ops.nms` and `torchvision.io.decode_image` (we use Pillow and PyAV).

`import vla` installs the hook, so a process that unpickles or imports anything of ours has it too. The hook costs
nothing until torchvision is imported, and does not import torch.
"""

from __future__ import annotations

import importlib.machinery
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# Signatures as torchvision's C++ sources declare them. They are the ones its Python code refers to while it is imported.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch.library.Library objects: their declarations vanish when they are collected.
_libraries: list[Any] = []


def install() -> None:
    """Add the import hook, once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision where Python would, with a loader that declares its operators first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        version_file = Path(self.path).with_name("version.py")
        if not _libraries and version_file.exists():
            import torch

            torch_has_gpu = torch.version.cuda is not None or torch.version.hip is not None
            if is_mismatched(torch_has_gpu, version_file.read_text(encoding="utf-8")):
                _declare(torch.library)
        super().exec_module(module)


def is_mismatched(torch_has_gpu: bool, version_file_text: str) -> bool:
    """Whether this torchvision (the text of its `version.py`) is a GPU build and torch is not.

    The installed package's metadata cannot tell: on the public index it lacks the `+cu130` that `version.py` has.
    """
    found = re.search(r"__version__ = ['\"][^'\"+]*\+([^'\"]*)['\"]", version_file_text)
    return not torch_has_gpu and found is not None and found[1].startswith(("cu", "rocm", "xpu"))


def _declare(torch_library: Any) -> None:
    library = torch_library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(operator)
    _libraries.append(library)
