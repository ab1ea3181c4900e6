"""Regions simulated on records of real pictures, beside the plain detector at four sizes.

    python experiments/real_regions_simulated.py RECORDS

RECORDS is a folder of experiments/real_records.py, in which experiments/real_coco.py has left what
the plain detector finds at other sizes (``test_baselines``). Maps and prices are chosen on
``router.npz``, figures are of ``test.npz``. Padding is left out everywhere: a size costs what the
pictures' own pixels cost, in multiples of 32.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.box_merging import Merge
from dynamicdet.routing.class_weights import class_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import Detections, RoutingRecord, read_record
from dynamicdet.routing.region_cells import rule_map
from dynamicdet.routing.region_fitting import fit_region_router
from dynamicdet.routing.region_maps import RegionRouter
from dynamicdet.routing.region_record import (
    cell_gains,
    grids_of,
    objects_by_class,
    planes_of,
    share_of_pixels,
    simulate_regions,
)
from dynamicdet.routing.regions import (
    choose_rectangles,
    price_curve,
    price_of_threshold,
    threshold_for_area,
)

#: The plain detector's sizes; exits see the first and the last.
SIZES = (320, 416, 512, 640)
#: Map, how exits are merged, and the share of the pixels that is looked at again.
POINTS = (
    *(('rule', 'wbf', share) for share in (0.1, 0.2, 0.35)),
    ('fitted', 'wbf', 0.2),
    ('true gains', 'wbf', 0.1),
)
#: Pictures that prices are chosen on, and prices.
PRICED, PRICES = 500, 9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('records', type=Path, help='folder of experiments/real_records.py')
    parser.add_argument('--bootstrap', type=int, default=100, help='resamples: 100')
    parser.add_argument('--seed', type=int, default=0, help='of the resamples: 0')
    args = parser.parse_args()
    torch.set_num_threads(1)
    truths = {
        split: read_truth(str(args.records / f'{split}.json')) for split in ('router', 'test')
    }
    records = {
        split: without_padding(read_record(args.records / f'{split}.npz'), truth)
        for split, truth in truths.items()
    }
    test = records['test']
    detections = [*plain_detections(args.records, test), test.detections[1]]
    costs = [plain_gflops(test, size) for size in SIZES]
    names = [f'plain, {size}' for size in SIZES]
    maps, curves = gain_maps(records, truths)
    for name, merge, share in POINTS:
        price = price_of_threshold(threshold_for_area(curves[name], share))
        rectangles = [choose_rectangles(gain_map, price) for gain_map in maps[name]]
        got = share_of_pixels(test, rectangles)
        # Exit 0 is plain at the smallest size; crops cost as pixels of the largest.
        costs.append(costs[0] + got * costs[3])
        detections.append(simulate_regions(test, rectangles, Merge.parse(merge)))
        names.append(f'{name}, {merge or "not merged"}, {got:.0%} of the pixels')
        print(names[-1], f'{costs[-1]:.2f} GFLOPs', flush=True)
    whole = [[(0, 0, *grid)] for grid in grids_of(test)]
    detections.append(simulate_regions(test, whole, Merge.parse('wbf')))
    costs.append(costs[0] + costs[3])
    names.append('whole pictures, wbf')
    print_table(test, truths['test'], names, costs, detections, args.bootstrap, args.seed)


def without_padding(record: RoutingRecord, truth) -> RoutingRecord:
    """A record whose pictures end where they do, as the larger exit sees them."""
    frames = []
    for identity in record.ids.tolist():
        image = truth.imgs[identity]
        scale = SIZES[-1] / max(image['width'], image['height'])
        height, width = round(image['height'] * scale), round(image['width'] * scale)
        frames.append((height, width, scale, scale))
    facts = dict(record.provenance, first_scale=SIZES[0] / SIZES[-1])
    return replace(record, frame=np.array(frames), provenance=facts)


def plain_gflops(record: RoutingRecord, size: int) -> float:
    """Mean GFLOPs of the plain detector at a size, without padding: as exit 0 costs per pixel."""
    per_pixel = record.gflops[0] / SIZES[0] ** 2
    sides = np.ceil(record.frame[:, :2] * size / SIZES[-1] / 32) * 32
    return float(per_pixel * sides.prod(1).mean())


def plain_detections(folder: Path, record: RoutingRecord) -> list[Detections]:
    """What the plain detector finds at all sizes but the last, in the record's order."""
    detections = []
    for size in SIZES[:-1]:
        (path,) = (folder / 'test_baselines').glob(f'plain-{size}-*.npz')
        baseline = read_record(path)
        row_of = {identity: row for row, identity in enumerate(baseline.ids.tolist())}
        rows = [row_of[identity] for identity in record.ids.tolist()]
        detections.append(baseline.detections[0].take(rows))
    return detections


def gain_maps(records: dict, truths: dict) -> tuple[dict, dict]:
    """Gains of the test pictures by each map, and prices by those of other pictures."""
    categories = records['router'].provenance['categories']
    weights = class_weights(objects_by_class(truths['router'], categories))
    planes = {split: planes_of(record, categories, weights) for split, record in records.items()}
    gains = {
        split: cell_gains(record, truths[split], categories, weights)
        for split, record in records.items()
    }
    router = RegionRouter()
    fit_region_router(
        router,
        [torch.from_numpy(image_planes) for image_planes in planes['router']],
        gains['router'],
    )
    router.requires_grad_(False)
    every = {
        'rule': lambda split: [rule_map(image_planes) for image_planes in planes[split]],
        'fitted': lambda split: [
            router(torch.from_numpy(image_planes)[None])[0].numpy()
            for image_planes in planes[split]
        ],
        'true gains': lambda split: gains[split],
    }
    maps = {name: make('test') for name, make in every.items()}
    curves = {
        name: price_curve(make('router')[:PRICED], points=PRICES) for name, make in every.items()
    }
    return maps, curves


def print_table(record, truth, names, costs, detections, resamples: int, seed: int) -> None:
    """AP of each point, and how far it is from the plain detector at a size that costs as much,
    with a 95 % interval over resampled pictures, paired."""
    nothing = [0.0] * len(detections)
    mixtures = Mixtures(
        RoutingRecord(record.ids, record.files, record.difficulty, detections, nothing, nothing),
        truth,
    )
    draws = [np.ones(len(record), np.int64), *bootstrap_weights(len(record), resamples, seed)]
    aps = np.array(
        [
            [mixtures.ap(np.full(len(record), exit), resample) for exit in range(len(detections))]
            for resample in draws
        ]
    )
    print('| | GFLOPs | AP | above the plain detector |\n|---|---|---|---|')
    for exit, (name, cost) in enumerate(zip(names, costs)):
        front = np.array(
            [np.interp(cost, costs[: len(SIZES)], resampled[: len(SIZES)]) for resampled in aps]
        )
        more = aps[:, exit] - front
        low, high = np.percentile(more[1:], (2.5, 97.5))
        above = '' if exit < len(SIZES) else f'{more[0]:+.2f}, {low:.2f} to {high:.2f}'
        print(f'| {name} | {cost:.2f} | {aps[0, exit]:.1f} | {above} |')
    print(json.dumps(dict(pictures=len(record), resamples=resamples, seed=seed)))


if __name__ == '__main__':
    main()
