"""In which order the frames of videos come: whole videos for tests, clips for training.

Letters: T frames of a clip, B videos at a time.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdet.registry import DATA_SAMPLERS

from ..errors import UsageError
from .video import ClipFrame, VideoDataset


def share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share videos out so that the parts have about as many frames: the longest first, to who has
    least.

    Args:
        lengths (Sequence[int]): Frames of each video.
        parts (int): Number of parts, at least 1.

    Returns:
        list[list[int]]: Places in ``lengths``, ascending; empty where there are too few videos.
    """
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, part = heapq.heappop(loads)
        shares[part].append(place)
        heapq.heappush(loads, (load + lengths[place], part))
    return [sorted(share) for share in shares]


def lockstep(videos: Sequence[Sequence[int]], streams: int) -> Iterator[list[int]]:
    """Go through several videos at a time.

    Args:
        videos (Sequence[Sequence[int]]): Rows of the frames of each video.
        streams (int): B. When a video ends, the next one takes its place.

    Yields:
        list[int]: The next row of each of at most B videos; never two of one video.
    """
    waiting, running = deque(deque(rows) for rows in videos if rows), []
    while waiting or running:
        while waiting and len(running) < streams:
            running.append(waiting.popleft())
        yield [rows.popleft() for rows in running]
        running = [rows for rows in running if rows]


@DATA_SAMPLERS.register_module()
class VideoSampler(Sampler):
    """Frame after frame, video after video; each rank has whole videos.

    Nothing is padded: ranks may have different numbers of frames, and each frame is there once.

    Args:
        dataset (VideoDataset): Data set.
        seed (int, optional): Not used; mmengine gives it to every sampler.
    """

    def __init__(self, dataset: VideoDataset, seed: int | None = None) -> None:
        rank, ranks = get_dist_info()
        self.dataset = dataset
        videos = list(require_videos(dataset).values())
        self.videos = [
            videos[place] for place in share_out([len(rows) for rows in videos], ranks)[rank]
        ]

    def __iter__(self) -> Iterator[int]:
        return (row for rows in self.videos for row in rows)

    def __len__(self) -> int:
        return sum(map(len, self.videos))


@DATA_SAMPLERS.register_module()
class StreamBatchSampler(Sampler):
    """Batches of frames of different videos, which run side by side. See `lockstep`.

    Args:
        sampler (VideoSampler): Gives the videos of this rank.
        batch_size (int): B. Batches are smaller when fewer videos are left.
    """

    def __init__(self, sampler: VideoSampler, batch_size: int) -> None:
        if not isinstance(sampler, VideoSampler):
            raise UsageError(
                f'StreamBatchSampler needs a VideoSampler; got {type(sampler).__name__}'
            )
        self.sampler, self.batch_size = sampler, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return lockstep(self.sampler.videos, self.batch_size)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@DATA_SAMPLERS.register_module()
class ClipSampler(Sampler):
    """Clips of T frames in the order of time, for training; the clips in random order.

    Every epoch takes a clip at a random place from each part of a video, parts as long as a clip is
    in the mean. Make the batch size a multiple of T: a batch is then whole clips, one after the
    other, each with ``clip_step`` 0 to T - 1. The frames of a clip are augmented alike.

    Args:
        dataset (VideoDataset): Data set.
        frames (int): T, at least 1. Videos of fewer frames are left out.
        gaps (tuple[int, int]): Least and most rows from one frame of a clip to the next, drawn anew
            each time. Where a video is too short for the gaps, they are smaller. Defaults to (1,
            1).
        seed (int, optional): Defaults to a random one, the same on all ranks.

    Raises:
        UsageError: If a number is out of range, or no video is long enough.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        frames: int,
        gaps: tuple[int, int] = (1, 1),
        seed: int | None = None,
    ) -> None:
        if frames < 1 or not 1 <= gaps[0] <= gaps[1]:
            raise UsageError(
                f'ClipSampler takes frames >= 1 and gaps 1 <= least <= most; got {frames}, {gaps}'
            )
        self.rank, self.ranks = get_dist_info()
        self.dataset, self.frames, self.gaps = dataset, frames, gaps
        self.videos = [rows for rows in require_videos(dataset).values() if len(rows) >= frames]
        if not self.videos:
            raise UsageError(f'no video has {frames} frames, which ClipSampler needs')
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        # The mean length of a clip from its first frame to the next clip's.
        span = (frames - 1) * sum(gaps) / 2 + 1
        self.counts = [max(1, int(len(rows) / span)) for rows in self.videos]
        self.clips = -(-sum(self.counts) // self.ranks)  # of each rank

    def __iter__(self) -> Iterator[ClipFrame]:
        rng = np.random.default_rng([self.seed, self.epoch])
        parts = zip(self.videos, self.counts)
        clips = [clip for rows, count in parts for clip in self._cut(rng, rows, count)]
        seeds = rng.integers(2**31, size=len(clips)).tolist()
        # As many for each rank: some come twice.
        order = np.resize(rng.permutation(len(clips)), self.clips * self.ranks)
        for number in order[self.rank :: self.ranks]:
            yield from (
                ClipFrame(row, step, seeds[number]) for step, row in enumerate(clips[number])
            )

    def __len__(self) -> int:
        return self.clips * self.frames

    def set_epoch(self, epoch: int) -> None:
        """mmengine calls it before each epoch."""
        self.epoch = epoch

    def _cut(self, rng: np.random.Generator, rows: list[int], count: int) -> list[list[int]]:
        """Clips of a video, ``count`` of them, each within its part of the video."""
        edges = np.linspace(0, len(rows), count + 1).astype(int)
        clips = []
        for start, end in zip(edges[:-1], edges[1:]):
            steps = rng.integers(self.gaps[0], self.gaps[1] + 1, self.frames - 1)
            places = np.concatenate([[0], np.cumsum(steps)])
            room = len(rows) - 1 - places[-1]
            if room < 0:
                # Too long even for the whole video: spread over it.
                places, room = np.linspace(0, len(rows) - 1, self.frames).astype(int), 0
            # Anywhere in its part; where it does not fit, as far back as it must.
            first = min(int(rng.integers(start, max(start, end - 1 - places[-1]) + 1)), room)
            clips.append([rows[first + place] for place in places])
        return clips


def require_videos(dataset: VideoDataset) -> dict:
    """A data set's videos, or a `UsageError` that says what is needed."""
    if not hasattr(dataset, 'videos'):
        raise UsageError(f'samplers of videos take a VideoDataset, not {type(dataset).__name__}')
    return dataset.videos()
