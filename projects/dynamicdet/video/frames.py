"""Frames on their way through the layers, and their detections."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.structures import DetDataSample, SampleList
from mmdet.structures.bbox import scale_boxes

from ..transfers import take_rows
from .lazy_layers import LazyLayers
from .streams import VideoStream


@dataclass
class Frames:
    """N frames, no two of one stream, that have not left yet.

    Attributes:
        layers (LazyLayers): Of these frames.
        samples (list[DetDataSample]): Theirs.
        streams (list[VideoStream]): Theirs.
        difficulties (list[float]): As the gate saw them last; 1 where it has not.
        early (Tensor, optional): Summary of the early map, (N, d).
        change (Tensor, optional): (N,).
        cut (Tensor, optional): (N,), bool: where the scene is another.
        pooled (list[Tensor]): As of `Evidence`.
        earlier (list[InstanceData], optional): As of `Evidence`.
        passed (list[list[InstanceData]]): Where exits are merged, what each exit that was passed
            found by itself, in the network's frame: by exit, then by frame.
    """

    layers: LazyLayers
    samples: SampleList
    streams: list[VideoStream]
    difficulties: list[float]
    early: Tensor | None = None
    change: Tensor | None = None
    cut: Tensor | None = None
    pooled: list[Tensor] = field(default_factory=list)
    earlier: list[InstanceData] | None = None
    passed: list[list[InstanceData]] = field(default_factory=list)

    def without(self, places: Sequence[int]) -> 'Frames':
        """All but some of them; the layers are of those alone from now on."""
        gone = set(places)
        kept = [place for place in range(len(self.samples)) if place not in gone]
        self.layers.keep(kept)

        def of_kept(values: list | None) -> list | None:
            return values and [values[place] for place in kept]

        return Frames(
            self.layers,
            of_kept(self.samples),
            of_kept(self.streams),
            of_kept(self.difficulties),
            None if self.early is None else take_rows(self.early, kept),
            None,
            None,
            [take_rows(features, kept) for features in self.pooled],
            of_kept(self.earlier),
            [of_kept(exit_detections) for exit_detections in self.passed],
        )


def scale_of(sample: DetDataSample) -> tuple[float, ...]:
    """By which width and height of the original image are multiplied for the network."""
    return tuple(sample.metainfo.get('scale_factor', (1.0, 1.0)))


def to_original(instances: InstanceData, sample: DetDataSample) -> InstanceData:
    """A copy of detections in the network's frame, in that of the original image."""
    instances = instances.clone()
    instances.bboxes = scale_boxes(instances.bboxes, [1 / factor for factor in sample.scale_factor])
    return instances


def no_detections(device: torch.device) -> InstanceData:
    """No detections."""
    return InstanceData(
        bboxes=torch.zeros(0, 4, device=device),
        scores=torch.zeros(0, device=device),
        labels=torch.zeros(0, dtype=torch.long, device=device),
    )


def last_detections(
    stream: VideoStream, sample: DetDataSample, rescale: bool, device: torch.device
) -> InstanceData:
    """A stream's last detections; none, on a device, where there are none."""
    if stream.detections is None:
        return no_detections(device)
    instances = stream.detections.clone()
    # By way of the network's frame, so that boxes stay on what they were found on where the
    # picture's size changes.
    before, now = (
        stream.scale if stream.rescaled else (1.0, 1.0),
        scale_of(sample) if rescale else (1.0, 1.0),
    )
    factors = [old / other for old, other in zip(before, now)]
    if factors != [1, 1]:
        instances.bboxes = scale_boxes(instances.bboxes, factors)
    return instances
