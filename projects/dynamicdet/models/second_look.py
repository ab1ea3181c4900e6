"""Regions: which parts of an image the second exit looks at, and what it finds there."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from mmengine.structures import InstanceData

from ..cascade.batch_state import BatchState
from ..routing.regions import price_of_threshold
from .regions import (
    Crop,
    batches_of,
    canvas_of,
    crops_of,
    cut_images,
    cut_maps,
    join_crops,
    sample_of_crop,
    to_whole_image,
)


class SecondLook:
    """Choose regions of images and run the second exit on them. A part of `DynamicDetector`."""

    def _choose_regions(self, state: BatchState, rescale: bool) -> BatchState:
        """Run the first exit's neck and heads, and say what is worth a second look."""
        self.detect(state, rescale)
        gains = self.regions.gain_maps(
            [by_exit[0] for by_exit in state.detections],
            state.samples,
            state.maps,
            state.ratio,
            rescale,
        )
        return self._with_regions(state, gains)

    def _with_regions(self, state: BatchState, gains: Sequence[np.ndarray]) -> BatchState:
        """Choose what is worth its price, of the gains of each image's cells, N times (h, w)."""
        regions = self.regions
        chosen = regions(gains, self.threshold)
        # As no regions: images that fit a tile go on as they are, padding included.
        whole = price_of_threshold(float(self.threshold)) <= 0
        fits = max(canvas_of(state.samples)) <= regions.tile
        chosen = [[] if whole and fits else rectangles for rectangles in chosen]
        return replace(
            state,
            difficulties=[regions.difficulty(gain_map) for gain_map in gains],
            exits=[int(whole or len(rectangles) > 0) for rectangles in chosen],
            regions=chosen,
        )

    def _look_again(self, state: BatchState, rescale: bool) -> BatchState:
        """Run the second exit on regions of images, neck and heads included, and join what it finds
        with what the first found. No more pixels are in memory at a time than the images have, or
        a tile for each of them."""
        settings = self.regions
        tiles = [settings.tiles(rectangles) for rectangles in state.regions]
        crops = crops_of(tiles, state.samples, settings)
        height, width = canvas_of(state.samples)
        most = len(state) * min(height * width, settings.tile**2)
        parts: list[list] = [[] for _ in state.samples]
        for some in batches_of(crops, most):
            for crop, instances in zip(some, self._detect_in_crops(state, some, rescale)):
                whole = to_whole_image(instances, crop, state.samples[crop.row], rescale)
                parts[crop.row].append((crop, whole))
        detections = [
            {1: join_crops(by_exit[0], part, sample, settings, self.merge, rescale)}
            for by_exit, part, sample in zip(state.detections, parts, state.samples)
        ]
        return replace(state, exit=1, maps=(), ratio=(1.0, 1.0), detections=detections)

    def _detect_in_crops(
        self, state: BatchState, crops: Sequence[Crop], rescale: bool
    ) -> list[InstanceData]:
        """What the second exit finds in crops of equal size, in their own frames."""
        images = None if state.images is None else cut_images(state.images, crops)
        maps = cut_maps(state.maps, canvas_of(state.samples), crops)
        samples = [sample_of_crop(state.samples[crop.row], crop) for crop in crops]
        maps, ratio = self._deeper_maps(1, images, maps, samples)
        return self._run_heads(BatchState(1, images, maps, ratio, samples, [], []), rescale)
