"""A batch on its way through the exits: what lies between one backbone and the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..routing.regions import Rectangle
from ..transfers import take_rows
from .resolution import Ratio


@dataclass(frozen=True)
class BatchState:
    """Images that stand before the same exit. Parts can be cut out, put away and joined later.

    Attributes:
        exit (int): The exit whose maps these are, 0 to K - 1.
        images (Tensor, optional): (N, 3, H, W), as delivered; None where no later backbone looks at
            them.
        maps (tuple[Tensor]): The maps of this exit's backbone, (N, C_i, H_i, W_i) each.
        ratio (tuple[float, float]): How large the images were that the maps were made from.
        samples (list): N, in the form of the framework; results go into them, or are made of
            them.
        difficulties (list[float]): N.
        exits (list[int]): Where each image leaves, N, none below ``exit``.
        detections (list[dict]): What exits found in each image so far, N, by
            exit, where exits are merged; see `DynamicDetector.detect`. Parts of a state share it.
        regions (list[list[Rectangle]]): What of each image is looked at again, N, in cells, see
            `routing.regions`; nothing where that is not asked for, or all of it is.
    """

    exit: int
    images: Tensor | None
    maps: tuple[Tensor, ...]
    ratio: Ratio
    samples: list
    difficulties: list[float]
    exits: list[int]
    detections: list[dict[int, Any]] = field(default_factory=list)
    regions: list[list[Rectangle]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Empty means that nothing was looked for yet.
        self.detections.extend({} for _ in self.samples[len(self.detections) :])
        self.regions.extend([] for _ in self.samples[len(self.regions) :])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shapes(self) -> tuple:
        """What must be equal for two to be joined."""
        tensors = self.maps if self.images is None else (self.images, *self.maps)
        return (self.exit, *(tuple(tensor.shape[1:]) for tensor in tensors))

    def take(self, rows: Sequence[int]) -> 'BatchState':
        """Some of the images: copies, so that the rest can be forgotten; this one itself if they
        are all."""
        rows = list(rows)
        if rows == list(range(len(self))):
            return self
        return replace(
            self,
            images=None if self.images is None else take_rows(self.images, rows),
            maps=tuple(take_rows(m, rows) for m in self.maps),
            samples=[self.samples[row] for row in rows],
            difficulties=[self.difficulties[row] for row in rows],
            exits=[self.exits[row] for row in rows],
            detections=[self.detections[row] for row in rows],
            regions=[self.regions[row] for row in rows],
        )

    def split(self) -> tuple['BatchState', 'BatchState']:
        """Those who leave at this exit, and those who go on. Either may be empty."""
        leaving = [row for row, exit in enumerate(self.exits) if exit == self.exit]
        going_on = [row for row, exit in enumerate(self.exits) if exit > self.exit]
        return self.take(leaving), self.take(going_on)


def join_batch_states(states: Sequence[BatchState]) -> BatchState:
    """States of equal ``shapes`` as one, in order."""
    first, *others = states
    if not others:
        return first
    return replace(
        first,
        images=None if first.images is None else torch.cat([state.images for state in states]),
        maps=tuple(torch.cat(maps) for maps in zip(*(state.maps for state in states))),
        samples=[sample for state in states for sample in state.samples],
        difficulties=[value for state in states for value in state.difficulties],
        exits=[exit for state in states for exit in state.exits],
        detections=[detections for state in states for detections in state.detections],
        regions=[regions for state in states for regions in state.regions],
    )
