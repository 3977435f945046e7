"""At the command line: every kind of bad input is one clear line, exit code 2, and nothing changes on disk."""

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest
from training import fake_dataset, sft_settings, tiny_backbone

from vla.cli import main
from vla.finetune import sft

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """fake/ (dataset), video/ (dataset), llava/ (backbone) and run/policy."""
    folder = tmp_path_factory.mktemp("good")
    fake_dataset(folder)
    tiny_backbone(folder)
    shutil.copytree(FIXTURES / "lerobot_v3_video", folder / "video")
    sft.run(sft_settings(folder, steps=1))
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "work"))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def finetune(folder: Path, data: str, *more: str) -> list[str]:
    base = ["--backbone", str(folder / "llava"), "--out", str(folder / "new"), "--steps", "1", "--device", "cpu"]
    return ["finetune", "--data", str(folder / data), *base, "--bins", "64", "--image-size-px", "32", *more]


def truncated_parquet(folder):
    cut(next((folder / "fake" / "data").rglob("*.parquet")))
    return finetune(folder, "fake"), [".parquet"]


def truncated_mp4(folder):
    cut(next((folder / "video" / "videos").rglob("*.mp4")))
    return finetune(folder, "video"), [".mp4"]


def no_statistics(folder):
    (folder / "run" / "policy" / "dataset_statistics.json").unlink()
    return ["serve", "--policy", str(folder / "run" / "policy")], ["dataset_statistics.json"]


def wrong_camera(folder):
    return finetune(folder, "fake", "--cameras", "wrist"), ["wrist", "front"]


def wrong_action_size(folder):
    edit(folder / "run" / "policy" / "policy.json", lambda v: v["action"].update(names=["a", "b", "c"]))
    arguments = [
        "eval",
        "--policy",
        str(folder / "run" / "policy"),
        "--out",
        str(folder / "new"),
        "--suite",
        "metaworld",
    ]
    return arguments, ["2 dimensions", "3, the policy's action size"]


def two_action_sizes(folder):
    return finetune(folder, "fake", "--data", str(folder / "fake"), str(folder / "video")), ["action dimensions"]


def unknown_preset(folder):
    return ["finetune", "tiny-dmo"], ["tiny-demo"]


def unknown_program(folder):
    return ["finetun"], ["did you mean `vla finetune`"]


def corrupt_policy_json(folder):
    cut(folder / "run" / "policy" / "policy.json")
    return ["rl", "--policy", str(folder / "run" / "policy"), "--out", str(folder / "new")], ["policy.json", "JSON"]


def corrupt_weights(folder):
    cut(folder / "run" / "policy" / "adapter" / "adapter_model.safetensors")
    return ["merge", "--policy", str(folder / "run" / "policy"), "--out", str(folder / "new")], ["adapter"]


def no_dataset(folder):
    return finetune(folder, "nowhere"), ["nowhere"]


def unknown_task(folder):
    return ["eval", "--policy", "expert", "--tasks", "open-door", "--out", str(folder / "new")], ["door-open"]


def unnorm_key(folder):
    return ["serve", "--policy", str(folder / "run" / "policy"), "--unnorm-key", "bridge"], ["'bridge'", "fake"]


CASES = [truncated_parquet, truncated_mp4, no_statistics, wrong_camera, wrong_action_size, two_action_sizes, unknown_preset,
         unknown_program, corrupt_policy_json, corrupt_weights, no_dataset, unknown_task, unnorm_key]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_clear_error_and_nothing_changed(folder, case, capsys):
    if case in (wrong_action_size, unknown_task, corrupt_policy_json):
        pytest.importorskip("metaworld", reason="needs the simulator: pip install 'vla-toolkit[metaworld]'")
    arguments, words = case(folder)
    before = tree(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert "expected" in errors[0] and "fix:" in errors[0]
    for word in words:
        assert word in errors[0], errors[0]
    assert tree(folder) == before


def test_port_in_use(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before = tree(folder)
        assert main(["serve", "--policy", str(folder / "run" / "policy"), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"{port}" in error and "fix:" in error
    assert tree(folder) == before
