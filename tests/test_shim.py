"""The torchvision import hook, in fresh processes: an import can only be tested once per process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vla import torchvision_shim


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_vla_is_light_and_installs_the_hook_once() -> None:
    code = """
import sys
import vla, vla.types
from vla import torchvision_shim
torchvision_shim.install()
hooks = [f for f in sys.meta_path if type(f).__name__ == "_Finder" and type(f).__module__ == "vla.torchvision_shim"]
heavy = {"torch", "torchvision", "transformers", "timm", "peft", "fastapi"} & set(sys.modules)
print(len(hooks), sorted(heavy))
"""
    done = run_python(code)
    assert done.stdout.strip() == "1 []", done.stdout + done.stderr


def test_looking_for_torchvision_does_not_import_torch() -> None:
    code = """
import sys, importlib.util
import vla
spec = importlib.util.find_spec("torchvision")
print(spec is not None, "torch" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.strip() == "True False", done.stdout + done.stderr


def test_timm_and_transformers_processors_import() -> None:
    code = """
import importlib, sys
import vla
import torchvision
import timm
from transformers import AutoProcessor, AutoModelForImageTextToText, SmolVLMProcessor
from torchvision.transforms import v2
import torch
assert v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
importlib.reload(torchvision)  # the operators must not be declared twice
print(timm.__name__, AutoProcessor.__name__, SmolVLMProcessor.__name__)
"""
    done = run_python(code)
    assert done.stdout.split() == ["timm", "AutoProcessor", "SmolVLMProcessor"], done.stderr


def test_a_child_process_that_imports_vla_has_it() -> None:
    code = """
import multiprocessing
import vla
from vla.torchvision_shim import is_mismatched

def main():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(is_mismatched, (False, "__version__ = '0.28.0+cu130'")))

if __name__ == "__main__":
    main()
"""
    done = run_python(code)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("torch_has_gpu", "version", "mismatched"),
    [
        (False, "0.28.0+cu130", True),
        (False, "0.28.0+rocm6.4", True),
        (False, "0.28.0+cpu", False),
        (False, "0.28.0", False),  # macOS
        (False, "0.28.0a0+8fb8771", False),  # built from source
        (True, "0.28.0+cu130", False),
    ],
)
def test_only_a_gpu_build_beside_a_cpu_torch_is_mended(torch_has_gpu: bool, version: str, mismatched: bool) -> None:
    text = f"__version__ = '{version}'\ngit_version = 'x'\n"
    assert torchvision_shim.is_mismatched(torch_has_gpu, text) is mismatched
