"""The built wheel holds every file of the package, and works where no checkout is.

Symbolic links and build back ends can lose whole folders without an error, so the contents are compared with git's list.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tokenizers", "finetune", "serve", "eval")

pytestmark = pytest.mark.slow


def tracked_files() -> list[str]:
    """Files git knows, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def expected_in_wheel() -> set[str]:
    expected = set()
    for name in tracked_files():
        top = name.split("/")[0]
        if top in PARTS:
            expected.add(f"vla/{name}")
        elif top == "vla" and name not in {f"vla/{part}" for part in PARTS}:  # the links themselves
            expected.add(name)
    return expected


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def wheel_of(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_the_wheel_holds_exactly_the_package(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
        sizes = {n: archive.getinfo(n).file_size for n in found}
    expected = expected_in_wheel()
    assert found == expected, f"missing {sorted(expected - found)}, extra {sorted(found - expected)}"
    for part in PARTS:
        assert any(n.startswith(f"vla/{part}/") for n in found)
    weights = [n for n in found if n.endswith(".safetensors")]
    assert weights and sum(sizes[n] for n in weights) <= 16 * 2**20, "the built-in backbone: present, at most 16 MB"


def test_the_sdist_holds_every_tracked_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    links = {f"vla/{part}" for part in PARTS}
    assert set(tracked_files()) - links - found == set()


def test_the_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    """In a new environment whose dependencies are this one's, so that only our own files come from the wheel.

    `.ci/run` installs it with its dependencies too.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel_of(built))]
    subprocess.run(install, check=True, timeout=300)
    # A path in a .pth file is not searched for further .pth files: our editable install stays invisible.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(str(python), "-c", "import vla, vla.tokenizers.uniform as u; print(vla.__file__, u.__file__)")
    assert all(str(site) in path for path in where.split())
    vla = str(python.with_name("vla"))
    assert run(vla, "--version").startswith("vla-toolkit ")
    run(vla, "demo", "--dry-run")
    assert list(elsewhere.iterdir()) == [], "a dry run writes nothing"
