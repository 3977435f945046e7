"""A dataset on the Hub that need not fit on the disk: files come when they are needed and the oldest go.

    vla finetune --data 'lerobot/droid_1.0.1#cache_gb=50' --shuffle-window 20000 --no-cache-images

The first opening reads all of it once, for its numbers (actions, states, instructions), from which statistics, held-out
episodes and the order of samples follow as for any dataset. They are kept in `$VLA_CACHE`; later openings read them there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from vla.finetune.formats.hub import HubAddress, Listing
from vla.finetune.formats.hub_cache import CachedFiles
from vla.finetune.formats.hub_index import FORMAT, load_or_build
from vla.finetune.formats.hub_parts import parts_of
from vla.finetune.formats.rlds_cache import cache_folder
from vla.finetune.formats.source import BadEpisode, FrameSource, Span
from vla.types import Episode, problem

OPEN_PARTS = 16
T = TypeVar("T")


class HubSource(FrameSource):
    """Random access in which frames that lie close together are cheap: see `ChunkDataset`'s `window`.

    Args:
        cache_gb: keep at most so many GB (1e9 bytes) of the data and video files, in all processes together, but always
            what is being read. What was downloaded in other ways is left alone.
        skip_bad: leave out episodes that cannot be used, as `without_bad` does.

    Raises:
        VlaError: as `vla.finetune.formats.hub.open_hub`; parts that differ in cameras or dimensions.
    """

    in_order = True

    def __init__(
        self, address: HubAddress, listing: Listing, name: str, cache_gb: float, skip_bad: bool = False
    ) -> None:
        if not cache_gb >= 0:
            raise problem(f"cache_gb {cache_gb}", "0 or more", "correct it")
        self._arguments = (address, listing, name, cache_gb, skip_bad)
        self.name, self.where = name, str(address)
        self.revision = listing.commit
        key = json.dumps([FORMAT, address.repo, address.folder, listing.commit, name, skip_bad])
        self._index = cache_folder() / "hub" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.index"
        self._index.parent.mkdir(parents=True, exist_ok=True)
        place = hashlib.sha256(f"{address.repo}/{address.folder}".encode()).hexdigest()[:24]
        self._files = self._index.with_name(f"{place}.files")  # of all commits: what an older one left is dropped too
        self._begin()
        numbers, facts = load_or_build(self._index, self._parts, self.where, self._cached, skip_bad)
        self._numbers = numbers
        self.fps, self.gripper = facts["fps"], facts["gripper"]
        self.cameras, self.action_names, self.state_names, self.empty = (
            tuple(facts[name]) for name in ("cameras", "action_names", "state_names", "empty")
        )
        self.bad = tuple(BadEpisode(*row) for row in facts["bad"])
        self._shapes, self._has_rewards = facts["shapes"], facts["has_rewards"]
        self._texts: list[str] = facts["texts"]
        self._about: list[list[Any]] = facts["episodes"]
        """Of each episode: file, record, success, seed, task."""
        stops = np.cumsum(numbers.lengths)
        self.episodes = [
            Span(i, int(e - n), int(e)) for i, (n, e) in enumerate(zip(numbers.lengths, stops, strict=True))
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return HubSource, self._arguments

    def actions(self) -> np.ndarray:
        return self._numbers.actions

    def states(self) -> np.ndarray | None:
        return self._numbers.states if self.state_names else None

    def rewards(self) -> np.ndarray | None:
        return self._numbers.rewards if self._has_rewards else None

    def instruction_of(self, i: int) -> str:
        self.check_frame(i)
        return self._texts[self._numbers.texts[i]]

    def success_of(self, episode: int) -> bool | None:
        return self._about[episode][2]

    def seed_of(self, episode: int) -> int | None:
        return self._about[episode][3]

    def task_of(self, episode: int) -> str | None:
        return self._about[episode][4]

    def place_of(self, episode: int) -> tuple[str, int | str | None]:
        return self._about[episode][0], self._about[episode][1]

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        self.check_camera(camera)
        height, width, depth = self._shapes[camera]
        return height, width, depth

    def images(self, i: int, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self.check_frame(i)
        for camera in cameras or ():
            self.check_camera(camera)
        episode = self.episode_of(i)
        step = i - self.episodes[episode].start
        return self._reading(episode, lambda reader, k: reader.images(reader.episodes[k].start + step, cameras))

    def encoded(self, i: int, camera: str) -> bytes | None:
        self.check_frame(i)
        self.check_camera(camera)
        episode = self.episode_of(i)
        step = i - self.episodes[episode].start
        return self._reading(episode, lambda reader, k: reader.encoded(reader.episodes[k].start + step, camera))

    def jpeg(self, i: int, camera: str) -> bytes | None:
        data = self.encoded(i, camera)
        return data if data is not None and data.startswith(b"\xff\xd8") else None

    def episode(self, i: int, cameras: Sequence[str] | None = None) -> Episode:
        if not 0 <= i < self.n_episodes:
            raise problem(f"episode {i}", f"0..{self.n_episodes - 1} in {self.where}", "choose another episode")
        return self._reading(i, lambda reader, k: replace(reader.episode(k, cameras), dataset=self.name))

    def _reading(self, episode: int, read: Callable[[FrameSource, int], T]) -> T:
        """`read(reader, its episode)`."""
        part, k = self._numbers.places[episode].tolist()
        return read(self._reader(part), k)

    def _reader(self, part: int) -> FrameSource:
        if self._pid != os.getpid():  # a forked child: what it inherits is its parent's
            self._cached.close()
            self._begin()
        if self._open and next(reversed(self._open)) == part:
            return self._open[part]
        found = self._open.pop(part, None)
        if found is None:
            found = self._checked(part, self._parts[part].open())
            while self._open and (len(self._open) >= OPEN_PARTS or not self._cached.shrink()):
                oldest = next(iter(self._open))
                del self._open[oldest]  # which closes its files
                used = {path for k in (part, *self._open) for path in self._parts[k].files}
                self._cached.release(path for path in self._parts[oldest].files if path not in used)
            self._cached.shrink()
        self._open[part] = found
        return found

    def _begin(self) -> None:
        """Nothing is open."""
        address, listing, name, cache_gb, skip_bad = self._arguments
        self._pid, self._cached = os.getpid(), CachedFiles(cache_gb, self._files)
        self._parts = parts_of(address, listing, name, skip_bad, self._cached)
        self._open: OrderedDict[int, FrameSource] = OrderedDict()
        """Part -> its reader, the one used last at the end."""

    def _checked(self, part: int, reader: FrameSource) -> FrameSource:
        """The reader, whose first episode must be what the index says it is: code may have changed."""
        mine = np.flatnonzero(self._numbers.places[:, 0] == part)
        span, other = self.episodes[mine[0]], reader.episodes[int(self._numbers.places[mine[0], 1])]
        if not np.array_equal(self.actions()[span.start : span.stop], reader.actions()[other.start : other.stop]):
            raise problem(f"{self._parts[part].files[0]} with other actions than {self._index} has", "the same",
                          "delete the index: it is made again")  # fmt: skip
        return reader
