"""The training samples of a run in the order of its stream, prepared as they are needed or ahead of time by workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from vla.finetune.data.augment import augment_observation
from vla.finetune.data.chunks import ChunkDataset, Sample
from vla.finetune.sft_settings import Settings
from vla.finetune.sft_setup import observation_of
from vla.spec import ImageSpec


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Training samples by (index, position in the stream): what is random about one depends on its position alone."""

    settings: Settings
    dataset: ChunkDataset
    image: ImageSpec
    """The policy's."""

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        index, position = place
        sample = self.dataset[index]
        if self.settings.state_dropout and drops_state(self.settings, position):
            sample = dataclasses.replace(sample, state=None)
        if self.settings.history_dropout and drops_history(self.settings, position):
            sample = dataclasses.replace(sample, past_actions=None)
        if not self.settings.augment:
            return sample
        seen = augment_observation(observation_of(sample), self.image, self.settings.seed, position)
        return dataclasses.replace(sample, images=seen.images)


def training_stream(prepared: Prepared, position: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[list[Sample]]:  # fmt: skip
    """This rank's share of one batch after another, without end, from `position` (samples consumed by all ranks) on.

    The same samples whatever `data_workers`: workers only prepare them ahead.
    """
    places = _places(prepared.dataset, position, batch, rank, world)
    if prepared.settings.data_workers == 0:
        return ([prepared[place] for place in part] for part in places)
    dataset: Any = prepared  # DataLoader takes anything with __getitem__, whatever its annotation says
    sampler: Any = places
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=prepared.settings.data_workers, collate_fn=list))


def _places(dataset: ChunkDataset, position: int, batch: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    while True:
        indices = dataset.indices(position, batch)
        yield [(int(index), position + k) for k, index in enumerate(indices)][rank::world]
        position += batch


def drops_state(settings: Settings, position: int) -> bool:
    """Whether the sample at this position of the training stream is shown without its state."""
    draw = np.random.Generator(np.random.Philox(key=[settings.seed, position])).random(7)[-1]
    return bool(draw < settings.state_dropout)


def drops_history(settings: Settings, position: int) -> bool:
    """Whether it is shown without its past actions."""
    return bool(np.random.default_rng([settings.seed, position, 1]).random() < settings.history_dropout)
