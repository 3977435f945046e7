"""A policy behind HTTP, asked by the client that robots copy. Needs a policy directory.

python -m examples.serve_and_query runs/sft/policy
"""

import sys
from pathlib import Path

import numpy as np

from vla.serve.client import PolicyClient
from vla.serve.process import ServerProcess
from vla.serve.server import Settings


def main(policy: Path) -> None:
    with ServerProcess(Settings(policy=policy, port=0), log=policy.parent / "server.log") as server:
        client = PolicyClient(server.url)
        about = client.metadata
        print(
            "serving", about["name"], "cameras", about["cameras"], "chunk", about["horizon"], "x", about["action_dim"]
        )
        size = about["image_size_px"]
        observation = {
            "images": {camera: np.zeros((size, size, 3), np.uint8) for camera in about["cameras"]},
            "state": np.zeros(len(about["state_names"]), np.float32),
            "instruction": "open the window",
        }
        print(client.act([observation])[0].actions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
