"""Random numbers of a pipeline that belong to the sample, not to the process that happens to draw
them.

mmengine seeds data workers with a constant: those that start anew each epoch draw the same numbers
in each, those that live on go on from a state that no checkpoint holds. Here each sample has a
seed, which its index carries to wherever the data set is.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler


class SeededIndex(NamedTuple):
    """What a data set is asked for, and the seed of all that its pipeline draws for it."""

    seed: int
    index: Any


class SeededBatchSampler(Sampler):
    """The batches of another batch sampler, each index with a seed.

    Seeds follow from the run's seed, the rank, the pass over the data and the batch's number in it.
    So they are the same with any number of workers, and differ between passes and ranks.

    Args:
        batches (Sampler): Gives lists of indices.
        seed (int): The run's, from 0 on.
        rank (int): Of this process.
    """

    def __init__(self, batches: Sampler, seed: int, rank: int) -> None:
        self.batches, self.seed, self.rank = batches, seed, rank
        # mmengine looks for both.
        self.sampler, self.batch_size = batches.sampler, batches.batch_size
        #: Of the next pass; each pass counts it up.
        self.epoch = 0

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        epoch = self.epoch
        self.epoch += 1
        for number, batch in enumerate(self.batches):
            seeds = np.random.SeedSequence((self.seed, self.rank, epoch, number)).generate_state(
                len(batch)
            )
            yield [SeededIndex(*pair) for pair in zip(seeds.tolist(), batch)]

    def __len__(self) -> int:
        return len(self.batches)


def seed_samples(loader: DataLoader, seed: int, rank: int) -> None:
    """Let each sample of a loader draw from a seed of its own, in whichever process. For loaders of
    batches, before they are iterated; the data set stays the same object, since hooks change its
    pipeline.

    Args:
        loader (DataLoader): Changed in place.
        seed (int): The run's, from 0 on.
        rank (int): Of this process.
    """
    if loader.batch_sampler is None or isinstance(loader.batch_sampler, SeededBatchSampler):
        return
    if isinstance(loader.dataset, IterableDataset):
        return
    # torch forbids a new batch sampler, for the sake of iterators that have the old one; here is
    # none yet.
    object.__setattr__(
        loader, 'batch_sampler', SeededBatchSampler(loader.batch_sampler, seed, rank)
    )
    # torch's loaders call it with a whole batch of indices.
    loader.dataset.__getitems__ = partial(_seeded_items, loader.dataset)


def _seeded_items(dataset, indices: Sequence) -> list:
    return [_seeded_item(dataset, index) for index in indices]


def _seeded_item(dataset, index: Any) -> Any:
    if not isinstance(index, SeededIndex):
        return dataset[index]
    with drawing_from(index.seed):
        return dataset[index.index]


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Draw python's, numpy's and torch's random numbers from a seed, below 2 ** 32, and go on
    outside as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`, which reaches for the GPU: pipelines run on the CPU.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
