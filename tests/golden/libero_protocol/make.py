"""Computes the files of this folder with the code of the toolkits themselves. Not run by the tests; see README.md.

    python make.py tensorflow OPENVLA OFT OPENPI LEROBOT     # git directories; in an environment with TensorFlow
    python make.py torch OPENVLA OFT OPENPI LEROBOT          # in an environment with PyTorch

Their modules import simulators and models, so single functions are taken out of the committed files and executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
COMMITS = {
    "openvla": "c8f03f48af692657d3060c19588038c7220e9af9",
    "oft": "213c5ff8d6e9673885d7e4dd6f2ce73b5d8a45db",
    "openpi": "15a9616a00943ada6c20a0f158e3adb39df2ccac",
    "lerobot": "7427f31801f944f5ec9ce53cda02862ce7d1638b",
}
LIBERO_UTILS, ROBOT_UTILS = "experiments/robot/libero/libero_utils.py", "experiments/robot/robot_utils.py"
OPENVLA_UTILS, RUN = "experiments/robot/openvla_utils.py", "experiments/robot/libero/run_libero_eval.py"


def text(repositories: dict[str, str], name: str, path: str) -> str:
    return subprocess.run(
        ["git", f"--git-dir={repositories[name]}", "show", f"{COMMITS[name]}:{path}"], check=True, capture_output=True
    ).stdout.decode()


def functions(source: str, wanted: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """Execute only these functions of a file, with these global names."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name in wanted]
    body = [ast.parse("from __future__ import annotations").body[0], *found]
    exec(compile(ast.Module(body, []), "peer", "exec"), names)
    return names


def scene(size: int) -> np.ndarray:
    """uint8 (size, size, 3): a wall, a table in perspective, boxes with texture and edges, a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([150 + 60 * y, 140 + 50 * y, 120 + 30 * x], axis=-1)
    image[y > 0.45] = np.stack([120 + 90 * y, 90 + 60 * x, 60 + 0 * x], axis=-1)[y > 0.45]
    for _ in range(7):
        left, top = rng.uniform(0, 0.8, 2)
        wide, high = rng.uniform(0.08, 0.3, 2)
        inside = (x > left) & (x < left + wide) & (y > top) & (y < top + high)
        image[inside] = rng.uniform(0, 255, 3) * (0.8 + 0.2 * np.sin(40 * rng.uniform() * (x + y)))[inside, None]
    image[(np.hypot(x - 0.6, y - 0.65) < 0.12)] = (245, 245, 240)
    image[(np.hypot(x - 0.6, y - 0.65) < 0.09)] = (20, 20, 25)
    return np.clip(image + rng.integers(-1, 2, image.shape), 0, 255).astype(np.uint8)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def images(repositories: dict[str, str]) -> dict[str, Any]:
    """images.npz; returns the hashes of what would be too large to keep."""
    import tensorflow as tf

    def peer(name: str, path: str, wanted: list[str]) -> dict[str, Any]:
        names = {"tf": tf, "np": np, "Image": Image, "OPENVLA_IMAGE_SIZE": 224}
        return functions(text(repositories, name, path), wanted, names)

    # OpenVLA's crop stands in the middle of get_vla_action: those lines are executed as they are.
    openvla_utils = text(repositories, "openvla", OPENVLA_UTILS)
    crop_lines = re.search(r"    if center_crop:\n(.*?)\n\n    # Build VLA prompt", openvla_utils, re.S)
    assert crop_lines
    crop_source = (
        "def crop(image):\n    image = Image.fromarray(image)\n    if True:\n" + crop_lines[1] + "\n    return image"
    )
    names = peer("openvla", OPENVLA_UTILS, ["crop_and_resize"])
    exec(crop_source, names)
    resize = peer("openvla", LIBERO_UTILS, ["resize_image"])["resize_image"]
    get_image = peer("openvla", LIBERO_UTILS, ["resize_image", "get_libero_image"])["get_libero_image"]
    oft_names = ["resize_image_for_policy", "crop_and_resize", "center_crop_image", "check_image_format",
                 "prepare_images_for_vla"]  # fmt: skip
    oft = peer("oft", OPENVLA_UTILS, oft_names)
    pi = functions(
        text(repositories, "openpi", "packages/openpi-client/src/openpi_client/image_tools.py"),
        ["convert_to_uint8", "resize_with_pad", "_resize_with_pad_pil"], {"np": np, "Image": Image},
    )  # fmt: skip

    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (48, 61, 3), dtype=np.uint8)
    raw = scene(256)
    policy_input = get_image({"agentview_image": raw}, 224)
    arrays = {
        "raw": raw,
        "openvla": np.asarray(names["crop"](policy_input)),
        "noise": noise,
        "noise_resized": resize(noise, (40, 52)),
        "noise_jpeg": resize(noise, (48, 61)),  # an unchanged size: the JPEG round trip alone
        "noise_padded": pi["convert_to_uint8"](pi["resize_with_pad"](noise, 40, 40)),
        "noise_enlarged": resize(noise, (70, 90)),
    }
    np.savez_compressed(HERE / "images.npz", **arrays)
    hashes = {"openvla_uncropped": digest(policy_input)}
    cfg = SimpleNamespace(center_crop=True)
    turned = raw[::-1, ::-1]
    hashes["oft"] = digest(np.asarray(oft["prepare_images_for_vla"]([turned], cfg)[0]))
    hashes["openpi"] = digest(pi["convert_to_uint8"](pi["resize_with_pad"](np.ascontiguousarray(turned), 224, 224)))
    for name, frame in {"mirrored": raw[:, ::-1], "negative": 255 - raw, "swapped": raw[..., ::-1]}.items():
        hashes[f"openvla_{name}"] = digest(np.asarray(names["crop"](get_image({"agentview_image": frame}, 224))))
    return hashes


def numbers(repositories: dict[str, str]) -> None:
    """numbers.npz: quaternions and grippers."""
    rng = np.random.default_rng(2)
    quats = rng.normal(size=(40, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    edges = [[0, 0, 0, 1], [0, 0, 0, -1], [1, 0, 0, 0], [0, 0, 0, 1.0000001], [1e-9, 0, 0, 1], [1e-4, 0, 0, -1.0]]
    quats = np.concatenate([quats, -quats[:10], edges])
    unit = rng.uniform(0, 1, (30, 7))
    unit[:5, 6] = [0.0, 0.5, 1.0, 0.4999999, 0.5000001]
    arrays: dict[str, np.ndarray] = {"quats": quats, "unit": unit}
    for name, path, function in (
        ("openvla", LIBERO_UTILS, "quat2axisangle"), ("oft", LIBERO_UTILS, "quat2axisangle"),
        ("openpi", "examples/libero/main.py", "_quat2axisangle"),
    ):  # fmt: skip
        convert = functions(text(repositories, name, path), [function], {"np": np, "math": math})[function]
        arrays[f"axis_angle_{name}"] = np.stack([convert(quat.copy()) for quat in quats])
    for name in ("openvla", "oft"):
        wanted = ["normalize_gripper_action", "invert_gripper_action"]
        peer = functions(text(repositories, name, ROBOT_UTILS), wanted, {"np": np})
        for dtype in (np.float32, np.float64):
            binary = peer["normalize_gripper_action"](unit.astype(dtype), binarize=True)
            arrays[f"gripper_{name}_{dtype.__name__}"] = peer["invert_gripper_action"](binary)
            smooth = peer["normalize_gripper_action"](unit.astype(dtype), binarize=False)
            arrays[f"gripper_{name}_continuous_{dtype.__name__}"] = smooth
    np.savez_compressed(HERE / "numbers.npz", **arrays)


def constants(repositories: dict[str, str]) -> dict[str, Any]:
    """What stands in their files as a number."""
    found: dict[str, Any] = {}
    for name, run, utils in (("openvla", RUN, LIBERO_UTILS), ("oft", RUN, LIBERO_UTILS),
                             ("openpi", "examples/libero/main.py", "examples/libero/main.py"),
                             ("lerobot", "src/lerobot/envs/libero.py", "src/lerobot/envs/libero.py")):  # fmt: skip
        code, util = text(repositories, name, run), text(repositories, name, utils)
        limits = re.findall(r'task_suite_name == "(\w+)":\s+max_steps = (\d+)', code)
        limits = limits or [(a.lower(), b) for a, b in re.findall(r'(?:TaskSuite\.|")(\w+)"?: (\d+),  # longest', code)]
        wait = re.search(r"num_steps_wait: int = (\d+)", code)
        seed = re.search(r"env\.seed\((\w+)\)", util)
        assert wait and seed and len(limits) == 5, name
        found[name] = {"max_steps": {a: int(b) for a, b in limits}, "settle_steps": int(wait[1]), "env_seed": seed[1]}
    code = {name: text(repositories, name, RUN) for name in ("openvla", "oft")}
    code["openpi"] = text(repositories, "openpi", "examples/libero/main.py")
    for name, source in code.items():
        found[name]["trials"] = int(re.search(r"num_trials_per_task: int = (\d+)", source)[1])  # type: ignore[index]
    defaults = text(repositories, "lerobot", "src/lerobot/configs/default.py")
    found["lerobot"]["trials"] = int(re.search(r"n_episodes: int = (\d+)", defaults)[1])  # type: ignore[index]
    evaluation = text(repositories, "lerobot", "src/lerobot/configs/eval.py")
    found["lerobot"]["env_seed"] = re.search(r"seed: int \| None = (\d+)", evaluation)[1]  # type: ignore[index]
    libero = text(repositories, "lerobot", "src/lerobot/envs/configs.py").split("class LiberoEnv")[1]
    found["lerobot"]["image_size_px"] = int(re.search(r"observation_height: int = (\d+)", libero)[1])  # type: ignore[index]
    found["openvla"]["image_size_px"] = int(re.search(r"resolution=(\d+)\)", code["openvla"])[1])  # type: ignore[index]
    found["oft"]["image_size_px"] = int(re.search(r"env_img_res: int = (\d+)", code["oft"])[1])  # type: ignore[index]
    found["openpi"]["image_size_px"] = int(re.search(r"ENV_RESOLUTION = (\d+)", code["openpi"])[1])  # type: ignore[index]
    found["openpi"]["env_seed"] = re.search(r"\n    seed: int = (\d+)", code["openpi"])[1]  # type: ignore[index]
    found["openpi"]["n_execute"] = int(re.search(r"replan_steps: int = (\d+)", code["openpi"])[1])  # type: ignore[index]
    found["oft"]["n_execute"] = int(re.search(r"num_open_loop_steps: int = (\d+)", code["oft"])[1])  # type: ignore[index]
    for name in ("openvla", "oft", "lerobot"):
        path = "src/lerobot/envs/libero.py" if name == "lerobot" else LIBERO_UTILS
        dummy = functions(text(repositories, name, path), ["get_libero_dummy_action"], {})["get_libero_dummy_action"]
        found[name]["dummy_action"] = dummy() if name == "lerobot" else dummy("openvla")
    found["openpi"]["dummy_action"] = eval(re.search(r"DUMMY_ACTION = (.*)", code["openpi"])[1])  # type: ignore[index]
    return found


def lerobot_state(repositories: dict[str, str]) -> None:
    """lerobot.npz: float32 axis-angles, computed in PyTorch."""
    import torch

    source = text(repositories, "lerobot", "src/lerobot/processor/env_processor.py")
    convert = functions(source, ["_quat2axisangle"], {"torch": torch})["_quat2axisangle"]
    quats = np.load(HERE / "numbers.npz")["quats"]
    np.savez_compressed(HERE / "lerobot.npz", axis_angle=convert(None, torch.from_numpy(quats)).numpy())


def main() -> None:
    repositories = dict(zip(COMMITS, sys.argv[2:], strict=True))
    if sys.argv[1] == "torch":
        lerobot_state(repositories)
        return
    import PIL
    import tensorflow as tf

    record = {"commits": COMMITS, "versions": {"tensorflow": tf.__version__, "pillow": PIL.__version__, "numpy": np.__version__},
              "sha256": images(repositories), "constants": constants(repositories)}  # fmt: skip
    numbers(repositories)
    (HERE / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
