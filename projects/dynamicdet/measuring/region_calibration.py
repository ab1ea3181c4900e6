"""Measure what the prices of regions follow from."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch.utils.data import DataLoader

from ..errors import UsageError
from ..models import DynamicDetector
from ..models.budget_control import preserved_budget
from ..models.regions import along_curve
from ..progress import Progress
from ..routing.class_weights import class_weights
from ..routing.evaluation import read_truth
from ..routing.record import RoutingRecord
from ..routing.region_fitting import fit_region_router
from ..routing.region_record import cell_gains, objects_by_class, planes_of
from ..routing.regions import PriceCurve, price_curve, threshold_for_area
from ..timing import time_call
from .calibration import calibrate_scores, measure_gflops
from .flops import count_flops
from .latencies import force_dynamic_exit, measure_latencies, single_batches

#: Shares of the pixels at which costs are measured, images that they are measured on, and rounds.
_SHARES, _IMAGES, _ROUNDS = (0.0, 0.1, 0.3, 0.6, 1.0), 20, 3


def calibrate_regions(
    model: DynamicDetector,
    loader: DataLoader,
    progress: Progress,
    hard_share: float = 0.5,
    fit_scores: bool = False,
) -> dict:
    """Measure how much of images is worth each price and what that costs, and set the model's
    calibration and threshold to them. Where no map was fitted, classes weigh as the annotations
    have them.

    Args:
        model (DynamicDetector): With regions, on the device whose latencies count.
        loader (DataLoader): Over the validation set.
        progress (Callable): Wraps what is iterated over.
        hard_share (float): Share of the pixels that is looked at when nothing is asked for.
            Defaults to 0.5.
        fit_scores (bool): Whether to fit the scaling of the exits' scores before, on whole images;
            see `calibrate_scores`. Defaults to False: it stays as it is.

    Returns:
        dict: ``threshold``, and of each exit on whole images ``lat1`` and ``lat2`` in seconds and
            ``g0`` and ``g1`` in GFLOPs.

    Raises:
        UsageError: If scores are to be scaled under a map that was fitted to them as they are.
    """
    regions, dataset = model.regions, loader.dataset
    if fit_scores and regions.router.trained:
        raise UsageError(
            "this map of regions was fitted to the exits' scores as they are: calibrate --scores "
            'first, then record and fit'
        )
    if fit_scores:
        calibrate_scores(model, loader, progress)
    if not regions.router.trained:
        coco = read_truth(str(dataset.ann_file), dataset.cat_ids)
        weights = class_weights(objects_by_class(coco, dataset.cat_ids))
        regions.class_weights.copy_(torch.from_numpy(weights))
    maps = measure_gain_maps(model, loader, progress)
    curve = price_curve(maps, regions.halo, regions.limit, regions.overhead, step=regions.step)
    latencies = measure_latencies(model, dataset, progress)
    gflops = measure_gflops(model, dataset)
    columns = [*curve, *_costs_along(model, dataset, curve, progress)]
    regions.curve = torch.from_numpy(np.column_stack(columns)).to(regions.curve.device)
    difficulties = np.sort([regions.difficulty(gain_map) for gain_map in maps]).astype(np.float32)
    model.difficulties = torch.from_numpy(difficulties).to(model.difficulties.device)
    model.latencies.copy_(torch.tensor(latencies))
    model.gflops.copy_(torch.tensor(gflops))
    threshold = model.set_budget(hard_share=hard_share)
    return dict(
        threshold=threshold,
        **{f'lat{exit}': seconds for exit, seconds in enumerate(latencies, 1)},
        **{f'g{exit}': count for exit, count in enumerate(gflops)},
    )


@torch.no_grad()
def measure_gain_maps(
    model: DynamicDetector, loader: DataLoader, progress: Progress
) -> list[np.ndarray]:
    """What each cell of each image is expected to gain, n times (h, w). Runs exit 0."""
    maps = []
    with preserved_budget(model):
        force_dynamic_exit(model, 0)
        for batch in progress(loader, 'gains of regions'):
            data = model.data_preprocessor(batch, False)
            state = model.start(data['inputs'], data['data_samples'])
            detections = [by_exit[0] for by_exit in state.detections]
            maps += model.regions.gain_maps(detections, state.samples, state.maps, state.ratio)
    return maps


@torch.no_grad()
def _costs_along(
    model: DynamicDetector, dataset, curve: PriceCurve, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """GFLOPs and seconds per image at each price of a curve, (m,) each."""
    costs = _fitted_costs(model, dataset, curve, progress, _IMAGES, _ROUNDS, count_flops)
    return tuple(along_curve(curve, each).numpy() for each in costs)


@torch.no_grad()
def region_seconds(
    model: DynamicDetector,
    dataset,
    progress: Progress,
    images: int = _IMAGES,
    rounds: int = _ROUNDS,
) -> list[float]:
    """What a calibrated detector takes as it runs now: seconds of an image, of each of its regions,
    and of all of its pixels, (3,); see `Regions.put_seconds`.

    Args:
        model (DynamicDetector): With calibrated regions, in eval mode.
        dataset: The images; the first ones are timed.
        progress (Callable): Wraps what is iterated over.
        images, rounds (int): How many, and how often each is timed at each of some prices, after an
            untimed time.
    """
    curve = model.regions.price_curve()
    untimed = lambda run: (0, run())  # noqa: E731
    return _fitted_costs(model, dataset, curve, progress, images, rounds, untimed)[1].tolist()


def _fitted_costs(
    model: DynamicDetector,
    dataset,
    curve: PriceCurve,
    progress: Progress,
    images: int,
    rounds: int,
    count: Callable,
) -> tuple[np.ndarray, np.ndarray]:
    """GFLOPs and seconds of an image, of each of its regions and of all of its pixels, (3,) each:
    fitted to some images at some prices. ``count`` is `count_flops` or the like."""
    batches, device = single_batches(dataset, images, None), model.threshold.device
    rows, flops, seconds = [], [], []
    with preserved_budget(model):
        for share in progress(_SHARES, 'costs of regions'):
            model.set_budget(threshold=threshold_for_area(curve, share))
            for batch in batches:
                # The first counts, and warms up.
                counted, (sample,) = count(lambda: model.test_step(batch))
                times = [
                    time_call(lambda: model.test_step(batch), device)[0] for _ in range(rounds)
                ]
                rows.append((1.0, len(sample.regions), _share_of(sample)))
                flops.append(counted / 1e9)
                seconds.append(float(np.median(times)))
    return tuple(nnls(np.array(rows), np.array(costs))[0] for costs in (flops, seconds))


def _share_of(sample) -> float:
    """Share of an image's pixels in its regions."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in sample.regions]
    return math.fsum(areas) / math.prod(
        side / scale for side, scale in zip(sample.img_shape[:2], sample.scale_factor[::-1])
    )


def fit_regions(
    model: DynamicDetector, records: Sequence[RoutingRecord], seed: int = 0, progress=None
) -> dict:
    """Fit the map of a detector's regions to records, in place, and the weights of its classes.

    Args:
        model (DynamicDetector): With regions, whose router sees exit 0's detections alone.
        records (Sequence[RoutingRecord]): With ``frame``, and annotation files where their
            provenance says; images that the detector was not trained on are best.
        seed (int): Of the map's weights. Defaults to 0.
        progress (Callable, optional): Called with updates done and all.

    Returns:
        dict: ``images``; ``correlation``, the rank correlation of an image's map with what it
            gains; ``classes``, how many have objects.

    Raises:
        UsageError: If the router sees maps, a record lacks something, or nothing is to be gained.
    """
    regions = model.regions
    if regions.router.in_channels:
        raise UsageError(
            'records have no maps: fit regions with router=dict() or without in_channels'
        )
    facts = [record.provenance for record in records]
    categories = list(facts[0].get('categories', ()))
    if (
        any(list(provenance.get('categories', ())) != categories for provenance in facts)
        or not categories
    ):
        raise UsageError('the records must say their categories, and the same: record anew')
    cocos = [read_truth(str(provenance.get('ann_file', '')), categories) for provenance in facts]
    counts = sum(objects_by_class(coco, categories) for coco in cocos)
    weights = class_weights(counts)
    inputs, gains = [], []
    for record, coco in zip(records, cocos):
        planes = planes_of(record, categories, weights, regions.cell)
        inputs += [torch.from_numpy(image_planes) for image_planes in planes]
        gains += cell_gains(record, coco, categories, weights, regions.cell)
    regions.class_weights.copy_(torch.from_numpy(weights))
    correlation = fit_region_router(regions.router, inputs, gains, seed, progress=progress)
    return dict(images=len(inputs), correlation=correlation, classes=int((counts > 0).sum()))


def insert_regions(
    model: DynamicDetector, checkpoint: Mapping, facts: Mapping[str, object]
) -> dict:
    """A checkpoint with a model's fitted regions, ``state_dict`` and ``meta``, without the
    calibration of older ones; ``meta.regions`` has the facts. See
    `router_from_records.insert_router`."""
    state = {key.removeprefix('module.'): value for key, value in checkpoint['state_dict'].items()}
    if hasattr(model, 'spread_plain_weights'):
        state = model.spread_plain_weights(state)
    model.regions.curve = model.regions.curve[:0]
    region_state = model.regions.state_dict(prefix='regions.')
    state.update({name: value.cpu() for name, value in region_state.items()})
    meta = {
        name: value for name, value in checkpoint.get('meta', {}).items() if name != 'calibration'
    }
    return dict(state_dict=state, meta=dict(meta, regions=dict(facts)))
