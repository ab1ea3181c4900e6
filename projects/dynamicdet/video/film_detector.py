"""Films with regions: of each frame as much is looked at as changed and is worth its price.

Letters: ``N``: frames of a batch, (N, 3, H, W). ``h``, ``w``: rows and columns of a frame's grid of
cells, see `routing.regions`. ``D``: detections of a frame.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample, SampleList

from ..cascade.batch_state import BatchState
from ..errors import UsageError
from ..measuring.flops import count_flops
from ..models import DynamicDetector
from ..models.regions import canvas_of, crops_of, delivered_scale
from ..routing.region_cells import cells_of
from ..routing.regions import Rectangle, share_of_area
from ..transfers import take_rows, to_host
from .film_stakes import PARTS, cell_changes, spans_of, stakes_of, thumbnail_of, touches, velocities
from .frames import no_detections, scale_of
from .gates import MIN_SCORE
from .streams import Streams, VideoStream, stream_waves

#: What was found with this score or more is lost where what is found there now has less than this
#: share of it.
_SURE, _LOST = 0.3, 0.5


@dataclass
class FilmStream(VideoStream):
    """What is remembered of a film, beside the thumbnail (``early``) and the last detections.

    Attributes:
        velocity (np.ndarray): Of the detections, per frame, (D, 2).
        seen (int): Number of the frame that they are of.
        looked (float): Number of the last frame that was looked at as a whole; that is due at once
            after minus infinity.
    """

    velocity: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    seen: int = 0
    looked: float = -math.inf


@dataclass
class _Frame:
    """A frame on its way.

    Attributes:
        row (int): In the batch.
        sample (DetDataSample): Its sample.
        stream (FilmStream): Its film.
        thumbnail (Tensor): Of the frame.
        expected (InstanceData): The last detections, moved on where pixels changed.
        gains (np.ndarray): What is at stake, (h, w).
        whole (bool): Whether all of it is looked at, by exit 0 at least.
        regions (list[Rectangle]): Otherwise these are.
    """

    row: int
    sample: DetDataSample
    stream: FilmStream
    thumbnail: Tensor
    expected: InstanceData
    gains: np.ndarray
    whole: bool = True
    regions: list[Rectangle] = field(default_factory=list)


@MODELS.register_module()
class FilmDetector(DynamicDetector):
    """A dynamic detector with regions that remembers of each film what it found, and where pixels
    changed since.

    A frame in which nothing changed repeats the detections before, and costs nothing. Every n-th
    other frame exit 0 looks at as a whole. Of the frames between the second exit looks at regions
    alone, where something was, moved as it moved before, or where more changed than around; what is
    at stake there must be worth the price, see `film_stakes.stakes_of`. What is found in a region
    takes the place of what was there.

    It takes a `DynamicDetector`'s checkpoint, calibration and budget. A price of 0 is the full
    second exit on each frame that changed; at a threshold of 1 exit 0 alone looks at every n-th.

    Args:
        every (int): So many frames after one that was looked at as a whole, the next is, unless
            nothing changed. Defaults to 10.
        change (float): What changed by more, in gray levels of 255, changed. Defaults to 3.
        cut (float): A mean change above it is a cut: the film is forgotten. Defaults to 40.
        appearing (float): How many objects are expected to appear in a frame. Defaults to 0.5.
        whole_exit (int): Which exit looks at whole frames: 0, and the second one at what is worth
            it, or 1, for objects that are too small for exit 0. Defaults to 0.
        max_streams (int): Films remembered at a time, beside those of the batch. Defaults to 16.
        **detector: Arguments of `DynamicDetector`; ``regions`` defaults to its own settings.

    Raises:
        UsageError: If an argument is out of range, or the second exit needs the first one's maps of
            the whole frame.
    """

    def __init__(
        self,
        every: int = 10,
        change: float = 3.0,
        cut: float = 40.0,
        appearing: float = 0.5,
        whole_exit: int = 0,
        max_streams: int = 16,
        **detector,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f'every is a whole number of frames, 1 or more; got {every}')
        for name, value in dict(change=change, cut=cut, appearing=appearing).items():
            # Not `value < 0`, which lets NaN pass.
            if not isinstance(value, (int, float)) or not value >= 0:
                raise UsageError(f'{name} is a number, 0 or more; got {value}')
        if isinstance(whole_exit, bool) or whole_exit not in (0, 1):
            raise UsageError(f'whole_exit is 0 or 1; got {whole_exit}')
        super().__init__(**{'regions': {}, **detector})
        if self.regions is None or self.needs_step_one:
            raise UsageError(
                'a FilmDetector takes regions of one backbone at two sizes (backbones=1) or of a '
                'pair of detectors'
            )
        self.every, self.change, self.cut, self.appearing = every, change, cut, appearing
        self.whole_exit = whole_exit
        self._streams = Streams(max_streams, FilmStream)
        #: GFLOPs per pixel: of the second exit, and of exit 0 by the size of the frame.
        self._rates: dict[Hashable, float] = {}

    def train(self, mode: bool = True) -> 'FilmDetector':
        """As a `DynamicDetector`'s; all films are forgotten."""
        super().train(mode)
        # Not there yet while mmengine builds.
        if hasattr(self, '_streams'):
            self.reset()
        return self

    def reset(self, video_id: Hashable | None = None) -> None:
        """Forget a film, or all."""
        self._streams.forget(video_id)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detect in frames.

        Args:
            batch_inputs (Tensor): (N, 3, H, W).
            batch_data_samples (list[DetDataSample]): N samples. ``video_id`` in the metainfo is the
                film, ``frame_id`` the place in it; see `Streams`.
            rescale (bool): Whether boxes are in the original image's frame. Defaults to True.

        Returns:
            list[DetDataSample]: As of `DynamicDetector.predict`. ``exit`` is -1 where nothing was
            looked at, ``regions`` what the second exit saw, ``gflops`` (float) what the frame cost.
        """
        if self._budget_waits:
            self.set_budget(self.budget)
        keys = [sample.metainfo.get('video_id') for sample in batch_data_samples]
        for rows in stream_waves(keys):
            images = batch_inputs if len(rows) == len(keys) else take_rows(batch_inputs, rows)
            self._predict_wave(images, [batch_data_samples[row] for row in rows], rescale)
        return batch_data_samples

    def _predict_wave(self, images: Tensor, samples: SampleList, rescale: bool) -> None:
        """Frames of films that are all others."""
        frames = [
            self._expect(row, images[row], sample, stream, rescale)
            for row, (sample, stream) in enumerate(zip(samples, self._streams.at(samples, ())))
        ]
        parts: dict[Callable, list[_Frame]] = {}
        for frame in frames:
            look = self._look_at_regions if frame.regions else self._repeat
            if frame.whole:
                look = self._look_closely_at_all if self.whole_exit else self._look_at_all
            parts.setdefault(look, []).append(frame)
        for look, part in parts.items():
            rows = [frame.row for frame in part]
            look(images if len(rows) == len(frames) else take_rows(images, rows), part, rescale)

    def _expect(
        self, row: int, image: Tensor, sample: DetDataSample, stream: FilmStream, rescale: bool
    ) -> _Frame:
        """What a frame is expected to hold, and what of it is worth a look."""
        regions, grid = self.regions, self.regions.grid(sample)
        height, width = sample.img_shape[:2]
        thumbnail = thumbnail_of(image[:, :height, :width], regions.cell)
        frame = _Frame(row, sample, stream, thumbnail, no_detections(image.device), np.zeros(grid))
        if stream.early is None or (stream.rescaled, stream.scale) != (rescale, scale_of(sample)):
            stream.forget()
            return frame
        changes = cell_changes(thumbnail, stream.early, self._gray_levels)
        if changes.mean() > self.cut:
            stream.forget()
            return frame
        changed = changes > self.change
        scale = delivered_scale(sample) if rescale else np.ones(4)
        (last,) = to_host([stream.detections])
        boxes = last.boxes.numpy() * scale
        moves = touches(changed, spans_of(boxes, grid, regions.cell))
        shift = np.tile(moves[:, None] * stream.velocity * (stream.frame - stream.seen), 2)
        frame.expected = stream.detections.clone()
        frame.expected.bboxes = frame.expected.bboxes + frame.expected.bboxes.new_tensor(shift)
        spans = spans_of(boxes + shift * scale, grid, regions.cell)
        weights = regions.class_weights.cpu().numpy()
        values = last.scores.numpy() * weights[last.labels.numpy()]
        counted = last.scores.numpy() >= MIN_SCORE
        frame.whole = bool(changed.any()) and stream.frame - stream.looked >= self.every
        stays = counted & (moves | frame.whole)
        standing_out = changed & (changes - np.median(changes) > self.change)
        frame.gains = stakes_of(
            values[stays], spans[stays], standing_out, self.appearing * weights.mean()
        )
        if changed.any() and not frame.whole:
            frame.regions = regions.choose(frame.gains, float(self.threshold))
            # Where that costs as much as a look at all of it, that is better.
            cost = self.scales[self.whole_exit] ** 2
            frame.whole = share_of_area(frame.regions, grid, regions.halo, regions.step) >= cost
        return frame

    @property
    def _gray_levels(self) -> Tensor | float:
        """What makes gray levels of normalized values."""
        return getattr(self.data_preprocessor, 'std', 1.0)

    def _repeat(self, images: Tensor, frames: Sequence[_Frame], rescale: bool) -> None:
        """What is expected is the result; it is remembered as it was found, not as it moved on."""
        for frame in frames:
            frame.sample.pred_instances = frame.expected
            frame.sample.set_metainfo(
                dict(
                    exit=-1, difficulty=self.regions.difficulty(frame.gains), regions=[], gflops=0.0
                )
            )

    def _look_at_all(self, images: Tensor, frames: Sequence[_Frame], rescale: bool) -> None:
        """Exit 0 on all of each frame, the second exit where what that found, or what was there
        before, is worth it."""
        samples = [frame.sample for frame in frames]
        canvas = canvas_of(samples)

        def look() -> BatchState:
            maps, ratio = self._first_maps(images)
            state = BatchState(0, images, maps, ratio, samples, [], [])
            self.detect(state, rescale)
            return state

        state = self._counted(canvas, len(frames) * math.prod(canvas), look)
        detections = [by_exit[0] for by_exit in state.detections]
        gains = self.regions.gain_maps(detections, samples, state.maps, state.ratio, rescale)
        stakes = [frame.gains for frame in frames]
        state = self._with_regions(state, [sum(pair) for pair in zip(gains, stakes)])
        leaving, going_on = state.split()
        if len(leaving):
            self.finish(leaving, rescale)
        if len(going_on):
            pixels = sum(map(self._pixels_of, going_on.samples, going_on.regions))
            self._counted(1, pixels, lambda: self.finish(self.deepen(going_on, rescale), rescale))
        first = self._rates[canvas] * math.prod(canvas)
        for frame, regions, exit in zip(frames, state.regions, state.exits):
            frame.regions = regions
            pixels = self._pixels_of(frame.sample, regions) if exit else 0
            frame.stream.looked = frame.stream.frame
            self._remember(frame, first + pixels * self._rates.get(1, 0.0), rescale)

    def _look_closely_at_all(self, images: Tensor, frames: Sequence[_Frame], rescale: bool) -> None:
        """The second exit on all of each frame, in tiles where that is more than one."""
        for frame in frames:
            fits = max(canvas_of([frame.sample])) <= self.regions.tile
            frame.regions = [] if fits else [(0, 0, *self.regions.grid(frame.sample))]
            frame.expected = no_detections(images.device)
            frame.stream.looked = frame.stream.frame
        self._look_at_regions(images, frames, rescale)

    def _look_at_regions(self, images: Tensor, frames: Sequence[_Frame], rescale: bool) -> None:
        """The second exit on regions alone; where there are none, on all."""
        state = BatchState(
            0,
            images,
            (),
            (1.0, 1.0),
            [frame.sample for frame in frames],
            [self.regions.difficulty(frame.gains) for frame in frames],
            [1] * len(frames),
            [{0: frame.expected} for frame in frames],
            [frame.regions for frame in frames],
        )

        def look() -> None:
            # What is expected is replaced: it is no second opinion.
            merge, self.merge = self.merge, None
            try:
                self.finish(self.deepen(state, rescale), rescale)
            finally:
                self.merge = merge

        pixels = [self._pixels_of(frame.sample, frame.regions) for frame in frames]
        self._counted(1, sum(pixels), look)
        for frame, count in zip(frames, pixels):
            if self._is_lost(frame, rescale):
                frame.stream.looked = -math.inf
            self._remember(frame, count * self._rates[1], rescale)

    def _is_lost(self, frame: _Frame, rescale: bool) -> bool:
        """Whether what was expected in the regions is not there."""
        grid = self.regions.grid(frame.sample)
        scale = delivered_scale(frame.sample) if rescale else np.ones(4)
        inside = np.zeros(grid, bool)
        for top, left, bottom, right in frame.regions:
            inside[top:bottom, left:right] = True
        before, now = (
            detections.scores.numpy()[
                inside.flat[cells_of(detections.boxes.numpy() * scale, grid, self.regions.cell)]
            ].max(initial=0)
            for detections in to_host([frame.expected, frame.sample.pred_instances])
        )
        return before >= _SURE and now < _LOST * before

    def _remember(self, frame: _Frame, gflops: float, rescale: bool) -> None:
        """Keep what was found, and how it moves; say what it cost."""
        sample, stream = frame.sample, frame.stream
        sample.set_metainfo(dict(gflops=gflops))
        # A copy: whoever evaluates moves results to where they want them.
        instances = sample.pred_instances.clone()
        if stream.early is None:
            stream.velocity = np.zeros((len(instances), 2))
        else:
            before, after = (
                (detections.boxes.numpy(), detections.labels.numpy())
                for detections in to_host([stream.detections, instances])
            )
            gap = stream.frame - stream.seen
            stream.velocity = velocities(before, stream.velocity, after, gap)
        stream.early = self._seen_of(frame)
        stream.detections, stream.seen = instances, stream.frame
        stream.rescaled, stream.scale = rescale, scale_of(sample)

    def _seen_of(self, frame: _Frame) -> Tensor:
        """The thumbnail as it was where it was looked at last."""
        if frame.whole:
            return frame.thumbnail
        seen = frame.stream.early.clone()
        for rectangle in frame.regions:
            top, left, bottom, right = (PARTS * line for line in rectangle)
            seen[:, top:bottom, left:right] = frame.thumbnail[:, top:bottom, left:right]
        return seen

    # Costs.

    def _pixels_of(self, sample: DetDataSample, regions: Sequence[Rectangle]) -> int:
        """What the second exit sees of a frame, halos included; all of it without regions."""
        if not regions:
            return math.prod(canvas_of([sample]))
        return sum(math.prod(crop.size) for crop in crops_of([regions], [sample], self.regions))

    def _counted(self, key: Hashable, pixels: int, run: Callable) -> BatchState | None:
        """Run a part of the detector. What it costs is counted on its first run: that of
        convolutions grows with the pixels."""
        if key in self._rates:
            return run()
        flops, result = count_flops(run)
        self._rates[key] = flops / pixels / 1e9
        return result
