"""Regions of images that are looked at again: where they are, their crops, and what is found there.

Letters: ``N``: images of a batch, (N, 3, H, W). ``n``: crops. ``h``, ``w``: rows and columns of an
image's grid of cells, see `routing.regions`. ``m``: prices of a calibration.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample, SampleList

from ..cascade.resolution import Ratio
from ..errors import UsageError
from ..precision import KeepsType
from ..routing.box_merging import Merge
from ..routing.budget import Budget
from ..routing.region_cells import detection_planes, kept_of_crop, kept_of_earlier
from ..routing.region_maps import RegionRouter
from ..routing.regions import (
    CELL,
    PriceCurve,
    Rectangle,
    choose_rectangles,
    grid_of,
    highest_price,
    price_of_threshold,
    threshold_for_area,
    threshold_for_cost,
    threshold_of_price,
    tiles_of,
    with_halo,
)
from ..transfers import Followed, HostDetections, to_host
from .merging import join_kept

#: Columns of a calibration: a price curve's, and costs per image by the budget that asks for them.
COST_COLUMNS = dict(target_gflops=3, target_latency=4)
_COLUMNS = 3 + len(COST_COLUMNS)


class Crop(NamedTuple):
    """A region of an image of a batch.

    Attributes:
        row (int): The image, in [0, N).
        rectangle (tuple): In cells, without halo.
        box (tuple): With halo, in pixels: top, left, bottom, right.
    """

    row: int
    rectangle: Rectangle
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        top, left, bottom, right = self.box
        return bottom - top, right - left


class Regions(KeepsType):
    """Which regions of an image the second exit looks at.

    Args:
        num_classes (int): Of the detector.
        router (dict): Arguments of `RegionRouter`. Defaults to its own.
        halo (int): Cells around a region that are looked at, too. Defaults to 1.
        limit (int): The most regions of an image. Defaults to 2.
        overhead (float): What each region costs besides its area, in cells. Defaults to 0.
        cell (int): Sides of a cell in pixels, a multiple of the deepest map's stride. Defaults to
            32.
        step (int): Sides of a crop are multiples of so many cells, or the image's, so that few
            sizes occur: for runtimes that compile for each. Defaults to 1.
        first_size (int, optional): For large images, which are delivered as they are: the longest
            side in pixels at which exit 0 sees an image, whatever ``first_scale`` says beyond
            that; `DynamicDetector` goes by it. Defaults to None.
        tile (int): The longest side in pixels of what the second exit sees at once, halos included.
            What is larger, the whole image too, is cut into tiles. Defaults to 2048.

    Attributes:
        class_weights (Tensor): What an object of each class counts, (C,); ones until they are
            fitted or calibrated.
        curve (Tensor): The calibration, (m, 5), float64: threshold, share of pixels, number of
            regions, GFLOPs and seconds per image at each of m prices; empty before.
    """

    def __init__(
        self,
        num_classes: int,
        router: Mapping = {},
        halo: int = 1,
        limit: int = 2,
        overhead: float = 0.0,
        cell: int = CELL,
        step: int = 1,
        first_size: int | None = None,
        tile: int = 2048,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ('halo', halo, 0),
            ('limit', limit, 1),
            ('cell', cell, 1),
            ('step', step, 1),
            ('first_size', 32 if first_size is None else first_size, 32),
            ('tile', tile, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UsageError(
                    f'{name} of regions must be a whole number, {least} or more; got {value}'
                )
        if not overhead >= 0:
            raise UsageError(f'overhead of regions must be a number, 0 or more; got {overhead}')
        # Tiles grow to multiples of the step, as all crops do.
        most = tile // cell // step * step - 2 * halo
        if most < 1:
            raise UsageError(
                f'tile of regions must hold a cell and its halo, {(2 * halo + 1) * cell} pixels or '
                f'more and a step at least; got {tile}'
            )
        self.tile, self._tile_cells = tile, most
        self.halo, self.limit, self.overhead = halo, limit, overhead
        self.cell, self.step = cell, step
        self.router = RegionRouter(**router)
        self.register_buffer('class_weights', torch.ones(num_classes))
        self.register_buffer('curve', torch.zeros(0, _COLUMNS, dtype=torch.float64))
        #: Of these weights: planes are computed on the host.
        self._host_weights = Followed(_as_array)
        # Fitted to records, or trained in step 2, which says so.
        self.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Take calibrations of any length, and checkpoints from before there were regions."""
        for name, value in self.state_dict().items():
            state_dict.setdefault(prefix + name, value)
        self.curve = self.curve.new_empty(state_dict[f'{prefix}curve'].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def grid(self, sample: DetDataSample) -> tuple[int, int]:
        """Rows and columns of an image's cells."""
        return grid_of(*sample.img_shape[:2], self.cell)

    def planes(
        self, detections: HostDetections, sample: DetDataSample, scale: np.ndarray, view: float
    ) -> np.ndarray:
        """What the first exit's detections say of each cell, (`PLANES`, h, w); ``scale`` brings
        boxes into the delivered frame, (4,), ``view`` is how large exit 0 sees that."""
        return detection_planes(
            detections.boxes.numpy() * scale,
            detections.scores.numpy(),
            detections.labels.numpy(),
            self.grid(sample),
            self._host_weights(self.class_weights),
            self.cell,
            view,
        )

    @torch.no_grad()
    def gain_maps(
        self,
        detections: Sequence[InstanceData],
        samples: SampleList,
        maps: Sequence[Tensor],
        ratio: Ratio,
        rescaled: bool = True,
    ) -> list[np.ndarray]:
        """What each cell of each image is expected to gain, N times (h, w).

        Args:
            detections (Sequence[InstanceData]): The first exit's detections, N.
            samples (list[DetDataSample]): N.
            maps (Sequence[Tensor]): The first exit's maps, (N, C_i, H_i, W_i).
            ratio (tuple[float, float]): How large the first exit sees the images, see `resolution`.
            rescaled (bool): Whether boxes are in the frame of the original image. Defaults to True.
        """
        views = self.router_views(detections, samples, maps, ratio, rescaled)
        return [self.router(*view)[0].cpu().numpy() for view in views]

    @torch.no_grad()
    def router_views(
        self,
        detections: Sequence[InstanceData],
        samples: SampleList,
        maps: Sequence[Tensor],
        ratio: Ratio,
        rescaled: bool = True,
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """What the router sees of each image: planes, (1, `PLANES`, h, w), and the maps that it
        asks for, of the image alone. Arguments as of `gain_maps`."""
        for row, (on_host, sample) in enumerate(zip(to_host(detections), samples)):
            scale = delivered_scale(sample) if rescaled else np.ones(4)
            planes = torch.from_numpy(self.planes(on_host, sample, scale, min(ratio)))[None]
            seen = ()
            if self.router.in_channels:
                whole = crops_of([[(0, 0, *self.grid(sample))]], [sample], self)
                seen = cut_maps(
                    [feature_map[row : row + 1] for feature_map in maps], canvas_of([sample]), whole
                )
            yield planes.to(self.class_weights.device), seen

    def boxes_of(
        self, regions: Sequence[Rectangle], sample: DetDataSample, exit: int
    ) -> list[list[float]]:
        """What of an image was looked at again, for its result: left, top, right, bottom in pixels
        of the original image, halos included. All of it where it went on as a whole."""
        if exit and not regions:
            regions = [(0, 0, *self.grid(sample))]
        height, width = sample.img_shape[:2]
        boxes = []
        for crop in crops_of([regions], [sample], self):
            top, left, bottom, right = crop.box
            box = np.array([left, top, min(right, width), min(bottom, height)])
            boxes.append((box / delivered_scale(sample)).tolist())
        return boxes

    def difficulty(self, gains: np.ndarray) -> float:
        """An image's highest price, as a number in [0, 1]: above the threshold, something of it is
        looked at again."""
        return threshold_of_price(
            highest_price(gains, self.halo, self.overhead, self.step, self.limit)
        )

    def forward(self, gains: Sequence[np.ndarray], threshold: Tensor) -> list[list[Rectangle]]:
        """The regions of each image that are worth a price; who sets it while images come does so
        before, and sees these afterwards: see `budget_control`.

        Args:
            gains (Sequence[np.ndarray]): N times (h, w), see `gain_maps`.
            threshold (Tensor): The price, a number in [0, 1].
        """
        price = float(threshold)
        return [self.choose(gain_map, price) for gain_map in gains]

    def choose(self, gains: np.ndarray, threshold: float) -> list[Rectangle]:
        """The regions of an image that are worth a price, given as a number in [0, 1]."""
        price = price_of_threshold(threshold)
        return choose_rectangles(gains, price, self.halo, self.limit, self.overhead, self.step)

    def tiles(self, rectangles: Sequence[Rectangle]) -> list[Rectangle]:
        """The regions of an image, those cut that are larger than `tile` with their halo."""
        most = self._tile_cells
        return [tile for rectangle in rectangles for tile in tiles_of(rectangle, most)]

    # The calibration.

    def price_curve(self) -> PriceCurve:
        """Thresholds, shares of pixels and numbers of regions, as calibrated.

        Raises:
            UsageError: If there is no calibration.
        """
        if not len(self.curve):
            raise UsageError(
                'this budget needs a checkpoint calibrated for regions: run tools/calibrate.py on '
                'it first'
            )
        return PriceCurve(*self.curve[:, :3].T.cpu().numpy())

    def put_seconds(self, seconds: Sequence[float]) -> None:
        """Let budgets in time go by seconds that were measured elsewhere: of an image, of each of
        its regions and of all of its pixels, (3,); see `region_calibration.region_seconds`."""
        self.curve[:, 4] = along_curve(PriceCurve(*self.curve[:, :3].T), seconds)

    def threshold_for(self, budget: Budget) -> float:
        """The threshold that meets a budget; a ``hard_share`` is a share of the pixels.

        Raises:
            UsageError: If it needs a calibration that is not there, or cannot be met.
        """
        if not isinstance(budget.value, (int, float)):
            raise UsageError(f'with regions {budget.kind} is one number, got {list(budget.value)}')
        if budget.kind == 'threshold':
            return float(budget.value)
        curve = self.price_curve()
        if budget.kind == 'hard_share':
            return threshold_for_area(curve, budget.value)
        name = dict(target_gflops='GFLOPs', target_latency='seconds')[budget.kind]
        costs = self.curve[:, COST_COLUMNS[budget.kind]].cpu().numpy()
        if not np.isfinite(costs).all():
            raise UsageError(
                f'{budget.kind} needs a checkpoint calibrated for it: run tools/calibrate.py on it '
                'again'
            )
        if budget.value < costs.min():
            raise UsageError(
                f'a target of {budget.value:g} {name} per image is below {costs.min():.4g}, what '
                'the first exit takes: it cannot be met, ask for more'
            )
        return threshold_for_cost(curve, costs, budget.value)


def along_curve(curve: PriceCurve, costs: Sequence[float]) -> Tensor:
    """Mean cost per image at each price of a calibration, (m,), float64; ``costs`` are of an image,
    of each of its regions and of all of its pixels, (3,)."""
    counts, shares = (torch.as_tensor(column) for column in (curve.counts, curve.shares))
    whole, region, pixels = costs
    return whole + region * counts + pixels * shares


# Crops.


def _as_array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def num_classes_of(branch: BaseDetector) -> int:
    """How many classes a detector knows."""
    head = getattr(branch, 'roi_head', None) or branch
    head = getattr(head, 'bbox_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if not hasattr(head, 'num_classes'):
        raise UsageError(
            f'{type(branch).__name__} does not say how many classes it knows: give '
            'regions=dict(num_classes=...)'
        )
    return head.num_classes


def canvas_of(samples: SampleList) -> tuple[int, int]:
    """Height and width of a batch, padding included."""
    return tuple(samples[0].batch_input_shape)


def crops_of(
    regions: Sequence[Sequence[Rectangle]], samples: SampleList, settings: Regions
) -> list[Crop]:
    """The crops of a batch, image by image.

    Args:
        regions (Sequence[Sequence[Rectangle]]): Of each image, N.
        samples (list[DetDataSample]): N.
        settings (Regions): Whose cells and halo count.
    """
    crops, canvas = [], canvas_of(samples)
    for row, (rectangles, sample) in enumerate(zip(regions, samples)):
        for rectangle in rectangles:
            box = with_halo(rectangle, settings.grid(sample), settings.halo, settings.step)
            # The last cells may lie in part beyond the batch.
            ends = (*canvas, *canvas)
            box = tuple(min(line * settings.cell, end) for line, end in zip(box, ends))
            crops.append(Crop(row, rectangle, box))
    return crops


def batches_of(crops: Sequence[Crop], most: int) -> Iterator[list[Crop]]:
    """Crops that run together: those of one size, and no more pixels than a number unless one
    alone has more. Memory is bounded by that.

    Args:
        crops (Sequence[Crop]): n.
        most (int): Pixels.

    Yields:
        list[Crop]: Each crop is in one list.
    """
    groups: dict[tuple[int, int], list[Crop]] = {}
    for crop in crops:
        groups.setdefault(crop.size, []).append(crop)
    for (height, width), group in groups.items():
        count = max(1, most // (height * width))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def cut_images(images: Tensor, crops: Sequence[Crop]) -> Tensor:
    """Crops of equal size of a batch's images, (n, 3, h, w)."""
    height, width = images.shape[-2:]
    if [crop.row for crop in crops] == list(range(len(images))) and all(
        crop.box == (0, 0, height, width) for crop in crops
    ):
        return images
    return torch.cat([_cut(images[crop.row : crop.row + 1], crop.box) for crop in crops])


def cut_maps(
    maps: Sequence[Tensor], canvas: tuple[int, int], crops: Sequence[Crop]
) -> tuple[Tensor, ...]:
    """The parts of a batch's maps that crops of equal size cover, (n, C_i, h_i, w_i). Where an edge
    is inside a cell of a map, that cell belongs to it."""
    return tuple(
        cut_images(
            values, _equal([crop._replace(box=_box_on(crop.box, canvas, values)) for crop in crops])
        )
        for values in maps
    )


def _box_on(box: Sequence[int], canvas: tuple[int, int], values: Tensor) -> tuple[int, ...]:
    """A box of an image on a map of it."""
    sides = tuple(values.shape[-2:])
    low = [at * side // whole for at, side, whole in zip(box[:2], sides, canvas)]
    high = [-(-at * side // whole) for at, side, whole in zip(box[2:], sides, canvas)]
    return (*low, *high)


def _equal(crops: Sequence[Crop]) -> Sequence[Crop]:
    """Crops cut to the smallest of them: those of equal size on an image may differ by a cell on a
    map whose stride does not divide their places."""
    height, width = (min(sides) for sides in zip(*(crop.size for crop in crops)))
    return [
        crop._replace(box=(*crop.box[:2], crop.box[0] + height, crop.box[1] + width))
        for crop in crops
    ]


def _cut(values: Tensor, box: Sequence[int]) -> Tensor:
    top, left, bottom, right = box
    return values[..., top:bottom, left:right]


def sample_of_crop(sample: DetDataSample, crop: Crop) -> DetDataSample:
    """What a head is told of a crop: it is an image of its own, scaled as the whole one was."""
    top, left, _, _ = crop.box
    height, width = crop.size
    shape = tuple(
        min(side, length - at) for side, length, at in zip(crop.size, sample.img_shape, (top, left))
    )
    whole = (top, left) == (0, 0) and shape == tuple(sample.img_shape[:2])
    wide, high = sample.get('scale_factor', (1.0, 1.0))
    return DetDataSample(
        metainfo=dict(
            sample.metainfo_items(),
            img_shape=shape,
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            ori_shape=sample.ori_shape
            if whole
            else (max(1, round(shape[0] / high)), max(1, round(shape[1] / wide))),
        )
    )


def delivered_scale(sample: DetDataSample) -> np.ndarray:
    """What brings boxes of the original image into the delivered frame, (4,)."""
    return np.tile(np.asarray(sample.get('scale_factor', (1.0, 1.0)), float), 2)


def to_whole_image(
    instances: InstanceData, crop: Crop, sample: DetDataSample, rescaled: bool = True
) -> InstanceData:
    """What was found in a crop, in the frame of its image: boxes moved, masks pasted.

    Args:
        found (InstanceData): With ``bboxes``, (D, 4), and perhaps ``masks``, (D, h, w), of the
            crop.
        crop (Crop): Where it is.
        sample (DetDataSample): Of its image.
        rescaled (bool): Whether the frame is that of the original image. Defaults to True.
    """
    top, left, _, _ = crop.box
    wide, high = sample.get('scale_factor', (1.0, 1.0)) if rescaled else (1.0, 1.0)
    across, down = left / wide, top / high
    moved = instances.new()
    if top or left:
        moved.bboxes = instances.bboxes + instances.bboxes.new_tensor([across, down, across, down])
    if 'masks' in instances:
        height, width = (sample.ori_shape if rescaled else sample.img_shape)[:2]
        if tuple(instances.masks.shape[-2:]) != (height, width):
            masks = instances.masks.new_zeros((len(instances), height, width))
            y, x = min(round(down), height), min(round(across), width)
            part = instances.masks[:, : height - y, : width - x]
            masks[:, y : y + part.shape[1], x : x + part.shape[2]] = part
            moved.masks = masks
    return moved


def join_crops(
    earlier: InstanceData,
    crops: Sequence[tuple[Crop, InstanceData]],
    sample: DetDataSample,
    settings: Regions,
    merge: Merge | None = None,
    rescaled: bool = True,
) -> InstanceData:
    """What an image holds, from the first exit's detections and those in its crops.

    What a crop's inner edge cuts is left out. Without ``merge`` what is found in a region takes the
    place of what the first exit found there, see `kept_of_earlier`; with it both are merged, and
    what several crops find in their halos.

    Args:
        earlier (InstanceData): Of the whole image.
        crops (Sequence[tuple]): Crops, each with what `to_whole_image` made of its detections.
        sample (DetDataSample): The image's.
        settings (Regions): Whose cells and halo count.
        merge (Merge, optional): Defaults to None.
        rescaled (bool): Whether boxes are in the frame of the original image. Defaults to True.
    """
    grid, scale = settings.grid(sample), delivered_scale(sample) if rescaled else np.ones(4)
    instances = [earlier, *(in_crop for _, in_crop in crops)]
    hosts = to_host(instances)
    boxes = [host.boxes.numpy() * scale for host in hosts]
    kept = [np.ones(len(earlier), bool)]
    for (crop, _), there in zip(crops, boxes[1:]):
        where = (crop.rectangle, grid, settings.halo, settings.cell)
        kept.append(kept_of_crop(there, *where, core=merge is None, step=settings.step))
        if merge is None:
            kept[0] &= kept_of_earlier(boxes[0], *where, settings.step)
    return join_kept(instances, hosts, kept, merge)
