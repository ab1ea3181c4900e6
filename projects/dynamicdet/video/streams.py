"""What is remembered of each stream of frames, and in which order frames must run.

Letters: N images of a batch, C channels, d numbers of a summary.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.structures import DetDataSample, SampleList, TrackDataSample

#: Parts, on each side, into which an early map is divided: a small object that moves is much of its
#: part.
GRID = 8


def early_summary(early: Tensor) -> Tensor:
    """Means of an early map over `GRID` x `GRID` parts, (N, C, H, W) to (N, d), float32."""
    return F.adaptive_avg_pool2d(early.float(), GRID).flatten(1)


def part_changes(first: Tensor, other: Tensor) -> Tensor:
    """How much each part of a scene changed: the Bray-Curtis dissimilarity (Bray and Curtis 1957),
    ``sum |a - b| / sum (|a| + |b|)`` over the channels of a part.

    Args:
        first (Tensor): From `early_summary`, (N, d).
        other (Tensor): As many.

    Returns:
        Tensor: (N, GRID * GRID), in [0, 1]; 0 where they are the same.
    """
    first, other = (x.unflatten(1, (-1, GRID**2)) for x in (first, other))
    total = (first.abs() + other.abs()).sum(dim=1)
    return ((first - other).abs().sum(dim=1) / total.clamp(min=1e-12)).clamp(max=1)


def early_change(first: Tensor, other: Tensor) -> Tensor:
    """How much a scene changed, (N,), in [0, 1]: as its part that changed most; one small object
    that moves is a change. Arguments as of `part_changes`."""
    return part_changes(first, other).amax(dim=1)


def is_cut(first: Tensor, other: Tensor, cut: float) -> Tensor:
    """Whether a scene is another, (N,): its parts changed by more than ``cut`` in the mean.
    Arguments as of `part_changes`."""
    return part_changes(first, other).mean(dim=1) > cut


class Memory(NamedTuple):
    """What a head keeps of a frame: its map, (C, 2S, 2S), the frame's number, and through how many
    frames its gradient goes back."""

    map: Tensor
    frame: int
    depth: int


@dataclass
class VideoStream:
    """What is remembered of a stream.

    Attributes:
        frame (int): Number of its latest frame.
        shape (tuple[int, ...]): Of its frames, as the network sees them.
        memories (dict[int, Memory]): By exit.
        early (Tensor, optional): Summary of the early map, (d,), of the frame that ``detections``
            are from.
        detections (InstanceData, optional): The detections that were computed last, in the
            original's frame or not, as ``rescaled`` says.
        scale (tuple[float, ...]): By which width and height of its original were multiplied for the
            network.
    """

    frame: int = 0
    shape: tuple[int, ...] = ()
    memories: dict[int, Memory] = field(default_factory=dict)
    early: Tensor | None = None
    detections: InstanceData | None = None
    rescaled: bool = True
    scale: tuple[float, ...] = (1.0, 1.0)

    def forget(self) -> None:
        """Begin anew: at a cut."""
        self.memories, self.early, self.detections = {}, None, None


class Streams:
    """The streams that are running.

    Args:
        limit (int): When there are more, those are forgotten that had no frame for longest. So
            memory stays flat over any number of videos.
        kind (type): What is remembered of each. Defaults to `VideoStream`.
    """

    def __init__(self, limit: int, kind: type[VideoStream] = VideoStream) -> None:
        self.limit, self.kind = limit, kind
        self._streams: OrderedDict[Hashable, VideoStream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    def forget(self, video_id: Hashable | None = None) -> None:
        """Forget a stream, or all. One that is not known is nothing to forget."""
        if video_id is None:
            self._streams.clear()
        else:
            self._streams.pop(video_id, None)

    def at(self, samples: SampleList, shape: Sequence[int]) -> list[VideoStream]:
        """The streams of N frames, no two of one stream, with these frames as the latest.

        A frame begins anew if its ``frame_id`` is 0 or not above the one before. Where the size
        that the network sees is another, it counts as changed, but what is remembered stays:
            neither memories nor detections
        are of a size. Without ``frame_id`` frames are counted, without ``video_id`` nothing is
        remembered.

        Args:
            samples (list[DetDataSample]): Of the frames.
            shape (Sequence[int]): Height and width of the batch.
        """
        streams = [self._at(sample.metainfo, tuple(shape)) for sample in samples]
        while len(self._streams) > max(self.limit, len(samples)):
            self._streams.popitem(last=False)
        return streams

    def _at(self, meta: dict, shape: tuple[int, ...]) -> VideoStream:
        shape = (*shape, *meta.get('img_shape', ())[:2])
        key = meta.get('video_id')
        old = self._streams.pop(key, None)
        frame = meta.get('frame_id', old.frame + 1 if old else 0)
        stream = old if old and frame > old.frame else self.kind()
        if stream.shape != shape:
            stream.early = None
        stream.frame, stream.shape = frame, shape
        if key is not None:
            self._streams[key] = stream
        return stream


def stream_waves(keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Part images so that no two of one stream run at once, and each stream's keep their order.

    Args:
        keys (Sequence): The stream of each image; None for those of none.

    Returns:
        list[list[int]]: Indices of the images that run first, second, ...
    """
    counts: dict[Hashable, int] = {}
    parts: list[list[int]] = []
    for index, key in enumerate(keys):
        place = 0 if key is None else counts.get(key, 0)
        counts[key] = place + 1
        if place == len(parts):
            parts.append([])
        parts[place].append(index)
    return parts


def clip_numbers(samples: SampleList) -> list[int]:
    """The clip of each image of a training batch, by number: one begins at each ``clip_step`` 0,
    and at each image without ``clip_step``."""
    numbers, number = [], -1
    for sample in samples:
        number += sample.metainfo.get('clip_step', 0) == 0
        numbers.append(max(number, 0))
    return numbers


def as_frames(inputs: Tensor, samples: Sequence) -> tuple[Tensor, list[DetDataSample]]:
    """Clips as mmdet's ``TrackDataPreprocessor`` gives them, frame by frame; a batch of images as
    it is.

    Args:
        inputs (Tensor): (N, 3, H, W), or of clips (B, T, 3, H, W).
        samples (Sequence): N ``DetDataSample``, or of clips B ``TrackDataSample`` of T frames, or
            lists.

    Returns:
        tuple: (B * T, 3, H, W) and the frames' own samples, clip after clip. Frames are told their
            ``clip_step``.
    """
    if inputs.dim() == 4:
        return inputs, list(samples)
    frames = []
    for clip in samples:
        clip_frames = clip.video_data_samples if isinstance(clip, TrackDataSample) else clip
        for step, sample in enumerate(clip_frames):
            sample.set_metainfo(dict(clip_step=step))
            frames.append(sample)
    return inputs.flatten(0, 1), frames
