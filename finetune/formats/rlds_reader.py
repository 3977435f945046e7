"""Read an RLDS dataset (Open X-Embodiment, or any of tensorflow_datasets' episodes) from a local folder, without TensorFlow.

Opening it reads every record once, for its numbers and the places of its images (see `rlds_index`, `rlds_cache`); after that
any frame is one `pread`. Images are decoded as TensorFlow decodes them, bit for bit (see `vla.jpeg`).
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla.finetune.data.standard import Standardizer
from vla.finetune.formats.rlds_cache import load_or_build
from vla.finetune.formats.rlds_index import Plan
from vla.finetune.formats.rlds_rule import generic_rule, is_camera
from vla.finetune.formats.source import BadEpisode, FrameSource, Span
from vla.finetune.formats.tf_example import parse_example
from vla.finetune.formats.tfds_features import Leaf, column, episode_length, read_features, unknown_key
from vla.finetune.formats.tfds_info import dataset_root, read_dataset_info, select
from vla.finetune.formats.tfrecord import read_record
from vla.jpeg import decode_jpeg, fault
from vla.types import VlaError, problem

OPEN_FILES = 64
JPEG_START = b"\xff\xd8"


class RldsReader(FrameSource):
    """Random access to the frames of an RLDS dataset. Episodes come in the order of the shards.

    Features that cannot be read (audio, video, custom ones) are in `unsupported`, by key with their type: they matter only
    to a rule that wants them.
    """

    def __init__(self, root: Path | str, split: str = "train", standardizer: Standardizer | None = None,
                 name: str | None = None, skip_bad: bool = False) -> None:  # fmt: skip
        """
        Args:
            root: the folder of the version (.../bridge_orig/1.0.0), or one above it if there is one version.
            split: as in TFDS: "train", "train[:95%]", "train[10:20]", "train+test".
            standardizer: what columns become actions, states and instructions; without one, see `generic_rule`.
            name: `unnorm_key`; the name of the folder above the version by default.
            skip_bad: leave out episodes that are damaged or not finite; they are listed in `bad`.

        Raises:
            VlaError: not such a dataset, an unknown split, or a record that cannot be used (its file and number are named).
        """
        folder = dataset_root(root)
        info = read_dataset_info(folder)
        self._arguments = (root, split, standardizer, name, skip_bad)
        self.where, self.split, self.fps = str(folder), split, 0.0
        self.name = name or (folder.resolve().parent.name if folder.name == info.version else info.name)
        self.leaves = read_features(folder)
        self.unsupported = {key: leaf.dtype for key, leaf in self.leaves.items() if leaf.kind == "unsupported"}
        self.rule = generic_rule(self.leaves, folder) if standardizer is None else standardizer
        self.gripper = str(getattr(standardizer, "gripper", ""))
        self.cameras, self.camera_keys = tuple(self.rule.cameras), dict(self.rule.cameras)
        self.action_names, self.state_names = tuple(self.rule.action_names), tuple(self.rule.state_names)
        _check_rule(self.rule, self.leaves, folder)
        self._plan = Plan(
            folder, select(info, split), self.leaves, self.rule, tuple(self.camera_keys.values()), skip_bad
        )
        index = load_or_build(self._plan)
        self._rows, self._instructions = index.rows, index.instructions
        self.bad: tuple[BadEpisode, ...] = index.bad
        stops = np.cumsum(self._rows.lengths).tolist()
        self.episodes = [
            Span(i, stop - int(n), stop) for i, (n, stop) in enumerate(zip(self._rows.lengths, stops, strict=True))
        ]
        self._files = _OpenFiles()

    def __reduce__(self) -> tuple[Any, ...]:
        return RldsReader, self._arguments

    def actions(self) -> np.ndarray:
        return self._rows.actions

    def states(self) -> np.ndarray | None:
        return self._rows.states if self.state_names else None

    def rewards(self) -> np.ndarray | None:
        """The feature `reward` of the steps."""
        return self._rows.rewards if self._plan.has_reward else None

    def instruction_of(self, i: int) -> str:
        self.check_frame(i)
        return self._instructions[self._rows.texts[i]]

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {name: self._decode(i, name) for name in (self.cameras if cameras is None else cameras)}

    def encoded(self, i: int, camera: str) -> bytes:
        """The image file (JPEG, PNG) of frame `i`, as it is in the dataset."""
        self.check_frame(i)
        self.check_camera(camera)
        offset, length = (int(x) for x in self._rows.spans[i, self.cameras.index(camera)])
        path = self._plan.slices[self._place(i)[0]].path
        data = self._files.descriptor(path).read(length, offset)
        if len(data) != length:
            raise problem(f"{self._at(i, camera)}: {len(data)} of {length} bytes", "the file as it was indexed",
                          "do not change a dataset while it is read; open it again")  # fmt: skip
        return data

    def jpeg(self, i: int, camera: str) -> bytes | None:
        data = self.encoded(i, camera)
        return data if data.startswith(JPEG_START) else None

    def place_of(self, episode: int) -> tuple[str, int]:
        number, record = self._rows.places[episode, :2]
        return str(self._plan.slices[number].path), int(record)

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        height, width = self._leaf(camera).shape[:2]
        return (height, width, 3) if height and width else self._first_shapes[camera]

    def raw_episode(self, i: int, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The recorded columns of an episode by flattened key, each (T, ...); see `tfds_features.column`.

        Args:
            keys: those wanted; by default all numbers and text that the record holds.

        Raises:
            VlaError: a key that the dataset lacks or that is neither numbers nor text.
        """
        if not 0 <= i < self.n_episodes:
            raise problem(f"episode {i}", f"0..{self.n_episodes - 1} in {self.where}", "choose one of this dataset")
        number, record, offset, length = (int(x) for x in self._rows.places[i])
        path = self._plan.slices[number].path
        data, where = read_record(path, record, offset, length), f"{path}: record {record}"
        example = parse_example(data, where)
        n = episode_length(self.leaves, example, where)
        if keys is None:
            keys = [
                key for key, leaf in self.leaves.items() if leaf.kind in ("number", "text") and leaf.names[0] in example
            ]
        return {key: column(self._known(key), example, data, n, where) for key in keys}

    @cached_property
    def _first_shapes(self) -> dict[str, tuple[int, int, int]]:
        shapes = {}
        for camera in self.cameras:
            for span in self.episodes:
                try:
                    shapes[camera] = (*self._decode(span.start, camera).shape[:2], 3)
                    break
                except VlaError:
                    if not self._plan.skip_bad or span is self.episodes[-1]:
                        raise
        return shapes

    def _known(self, key: str) -> Leaf:
        if key not in self.leaves:
            raise unknown_key(key, self.leaves, Path(self.where))
        return self.leaves[key]

    def _leaf(self, camera: str) -> Leaf:
        return self.leaves[self.camera_keys[camera]]

    def _place(self, i: int) -> tuple[int, int]:
        """Shard slice and record that frame `i` is in."""
        number, record = self._rows.places[self.episode_of(i), :2]
        return int(number), int(record)

    def _at(self, i: int, camera: str) -> str:
        number, record = self._place(i)
        return f"{self._plan.slices[number].path}: record {record}, step {self._rows.steps[i]}, camera {camera!r}"

    def _decode(self, i: int, camera: str) -> np.ndarray:
        data = self.encoded(i, camera)
        try:
            image = decode_image(data)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise problem(f"{self._at(i, camera)}: {len(data)} bytes that are no image ({fault(error)})", "a JPEG or PNG image",
                          "the frame is damaged: leave its episode out, or copy the file again") from error  # fmt: skip
        height, width = self._leaf(camera).shape[:2]
        if image.shape[0] != (height or image.shape[0]) or image.shape[1] != (width or image.shape[1]):
            raise problem(f"{self._at(i, camera)}: an image of {image.shape[0]} x {image.shape[1]} px",
                          f"{height} x {width}, as features.json says", "copy the dataset again")  # fmt: skip
        return image


def decode_image(data: bytes) -> np.ndarray:
    """An image file -> uint8 (height, width, 3), as TensorFlow's `decode_image(data, channels=3)`: grey becomes colour, alpha
    is dropped.

    Raises:
        OSError, SyntaxError, ValueError: as Pillow, if it is damaged or no image.
    """
    if data.startswith(JPEG_START):
        return decode_jpeg(data)
    with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "GIF")) as image:
        if image.mode.startswith("I"):
            raise ValueError("16 bits per pixel")
        return np.array(image.convert("RGB"))


def _check_rule(rule: Standardizer, leaves: dict[str, Leaf], root: Path) -> None:
    """The dataset has what the rule wants."""
    for key in rule.keys:
        if key not in leaves:
            raise unknown_key(key, leaves, root)
        if leaves[key].kind not in ("number", "text"):
            raise problem(
                f"{key!r} of type {leaves[key].dtype} in {root}", "numbers or text", "use another standardizer"
            )
    for camera, key in rule.cameras.items():
        if key not in leaves:
            raise unknown_key(key, leaves, root)
        if not is_camera(leaves[key]):
            raise problem(f"camera {camera!r}: {key!r} is {leaves[key].kind} of {leaves[key].dtype} in {root}",
                          "an 8-bit image in each step", "use another standardizer")  # fmt: skip


class _OpenFiles:
    """Descriptors of the last few files read. `pread` needs no position, so threads and forked children may share them."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def descriptor(self, path: Path) -> _Descriptor:
        found = self._open.get(path)
        if found is None:
            found = self._open[path] = _Descriptor(path)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # it closes when the last thread that reads from it is done
        return found


class _Descriptor:
    """A file descriptor that is closed when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self._number = -1
        try:
            self._number = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise VlaError(f"{path}: {error.strerror}; it was there when the dataset was opened") from error

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._number, length, offset)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)
