"""Regions on real pictures: AP against GFLOPs, simulated on a record and with real crops, beside a
plain detector at four sizes.

    python experiments/real_regions.py --data DATA --out work_dirs/real_regions

One YOLOX-nano with published weights is both exits, at 320 and 640 pixels. ``router.json`` fits the
map and the prices, ``test.json`` is what figures are of. Each step leaves its result, and is not
done again.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from dynamicdet.building import build_loader, load_detector
from dynamicdet.measuring.calibration import detection_arrays
from dynamicdet.measuring.flops import count_flops
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.measuring.region_calibration import fit_regions
from dynamicdet.progress import progress
from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.class_weights import class_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.merging import Merge
from dynamicdet.routing.record import Detections, RoutingRecord, read_record, write_record
from dynamicdet.routing.region_fitting import fit_region_router
from dynamicdet.routing.region_maps import RegionRouter, rule_map
from dynamicdet.routing.region_record import (
    cell_gains,
    grids_of,
    objects_by_class,
    planes_of,
    region_gflops,
    share_of_pixels,
    simulate_regions,
)
from dynamicdet.routing.regions import (
    PriceCurve,
    choose_rectangles,
    price_curve,
    price_of_threshold,
    threshold_for_area,
)

STOCK = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
#: Sizes of the plain detector, and of the delivered image.
SIZES, DELIVERED = (320, 416, 512, 640), 640
#: Shares of the pixels that are looked at again.
SHARES = (0.1, 0.2, 0.35)


#: How detections of both exits are merged.
MERGE = 'nms'
#: Resamples of the pictures, and their seed.
RESAMPLES, SEED = 500, 0


class Point(NamedTuple):
    """Mean GFLOPs per picture, and what was found."""

    gflops: float
    detections: Detections


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of real pictures')
    parser.add_argument('--out', type=Path, required=True, help='folder for records and results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    args.out.mkdir(parents=True, exist_ok=True)
    points = {f'plain {size}': make_plain(args, size) for size in SIZES}
    records = {split: make_record(args, split) for split in ('router', 'test')}
    truths = {split: read_truth(str(annotations(args.data, split))) for split in records}
    record = records['test']
    both = simulate_regions(
        record, [[(0, 0, *grid)] for grid in grids_of(record)], Merge.parse(MERGE)
    )
    points['exits merged'] = Point(region_gflops(record, 1.0), both)
    for name, (maps, price_maps) in gain_maps(records, truths).items():
        curve = price_curve(price_maps)
        for share in SHARES:
            points[f'{name}, simulated, {share:g}'] = simulated(record, maps, curve, share)
    for line in table(record, truths['test'], points):
        print(line, flush=True)
    for name in ('rule', 'fitted'):
        for share in SHARES:
            points[f'{name}, real crops, {share:g}'] = real_crops(args, records, name, share)
    for line in table(record, truths['test'], points):
        print(line)


def gain_maps(records: dict, truths: dict) -> dict[str, tuple[list, list]]:
    """Of each map its gains on the test split, and those that prices are chosen by."""
    categories = records['router'].provenance['categories']
    weights = class_weights(objects_by_class(truths['router'], categories))
    planes = {split: planes_of(record, categories, weights) for split, record in records.items()}
    gains = {
        split: cell_gains(record, truths[split], categories, weights)
        for split, record in records.items()
    }
    rule = {
        split: [rule_map(image_planes) for image_planes in every] for split, every in planes.items()
    }
    router = fitted(planes['router'], gains['router'])
    learned = {
        split: [router(torch.from_numpy(image_planes)[None])[0].numpy() for image_planes in every]
        for split, every in planes.items()
    }
    every = {'rule': rule, 'fitted': learned, 'true gains': gains}
    return {name: (maps['test'], maps['router']) for name, maps in every.items()}


def fitted(planes: list, gains: list) -> RegionRouter:
    """The region router, fitted to the split that is for that."""
    router = RegionRouter()
    with torch.no_grad():
        fit_region_router(
            router, [torch.from_numpy(image_planes) for image_planes in planes], gains, SEED
        )
    return router.requires_grad_(False)


def simulated(record, maps: list, curve: PriceCurve, share: float) -> Point:
    """Regions chosen by a map, at the price that takes a share of the other split's pixels."""
    price = price_of_threshold(threshold_for_area(curve, share))
    rectangles = [choose_rectangles(gain_map, price) for gain_map in maps]
    gflops = region_gflops(record, share_of_pixels(record, rectangles))
    return Point(gflops, simulate_regions(record, rectangles, Merge.parse(MERGE)))


def real_crops(args: argparse.Namespace, records: dict, name: str, share: float) -> Point:
    """The same with crops that really run, their GFLOPs counted."""
    path = args.out / f'crops_{name}_{share:g}.npz'
    if not path.exists():
        file = args.out / f'{name}.pth'
        if not file.exists():
            torch.save(calibrated(args, records, name), file)
        cfg = load_config(args.data, 'test', shared=True, regions={}, merge=MERGE)
        model, _ = load_detector(cfg, str(file), plain=True)
        model.set_budget(hard_share=share)
        write_point(run(model, cfg, path.stem), path)
    return read_point(path)


def calibrated(args: argparse.Namespace, records: dict, name: str) -> dict:
    """Weights and a map of regions with its prices, from the split that is for that."""
    cfg = load_config(args.data, 'router', shared=True, regions={}, merge=MERGE)
    model, checkpoint = load_detector(cfg, weights(args.data), plain=True)
    regions = model.regions
    truth = read_truth(str(annotations(args.data, 'router')))
    if name == 'fitted':
        fit_regions(model, [records['router']], SEED)
    else:
        counts = objects_by_class(truth, records['router'].provenance['categories'])
        regions.class_weights.copy_(torch.from_numpy(class_weights(counts)))
    record = records['router']
    categories = record.provenance['categories']
    planes = planes_of(record, categories, regions.class_weights.numpy())
    # What exit 0 finds is in the record: nothing has to run.
    maps = [
        regions.router(torch.from_numpy(image_planes)[None])[0].numpy() for image_planes in planes
    ]
    curve = np.array(price_curve(maps))
    columns = np.vstack([curve, np.full((2, curve.shape[1]), np.nan)]).T
    regions.curve = torch.from_numpy(columns)
    return dict(state_dict=model.state_dict(), meta=checkpoint.get('meta', {}))


def annotations(data: Path, split: str) -> Path:
    """The annotation file of a split."""
    return data / 'coco' / 'annotations' / f'{split}.json'


def table(record, truth, points: dict[str, Point]) -> list[str]:
    """A line for each point: GFLOPs, AP, and how far it is from the plain detector at a size that
    costs as much, with a 95 % interval over resampled pictures, paired."""
    every = [point.detections for point in points.values()]
    nothing = [0.0] * len(every)
    mixtures = Mixtures(
        RoutingRecord(record.ids, record.files, record.difficulty, every, nothing, nothing, {}),
        truth,
    )
    gflops = np.array([point.gflops for point in points.values()])
    ones = np.ones((1, len(record)), np.int64)
    weights = np.concatenate([ones, bootstrap_weights(len(record), RESAMPLES, SEED)])
    aps = np.array(
        [
            [mixtures.ap(np.full(len(record), k), resample) for k in range(len(every))]
            for resample in weights
        ]
    )
    plain = len(SIZES)
    lines = ['| | GFLOPs | AP | above the plain detector |', '|---|---|---|---|']
    for k, (name, cost) in enumerate(zip(points, gflops)):
        front = np.array([np.interp(cost, gflops[:plain], resampled[:plain]) for resampled in aps])
        more = aps[:, k] - front
        low, high = np.percentile(more[1:], (2.5, 97.5))
        said = '' if k < plain else f'{more[0]:+.1f} ({low:+.1f} to {high:+.1f})'
        lines.append(f'| {name} | {cost:.2f} | {aps[0, k]:.1f} | {said} |')
    return lines


def load_config(data: Path, split: str, size: int = DELIVERED, **settings) -> Config:
    """YOLOX-nano, plain or, with settings, dynamic, on one split at one size; padded to multiples
    of 32 pixels alone."""
    cfg = get_config(STOCK)
    dataset = cfg.test_dataloader.dataset
    dataset.update(
        data_root=f'{data}/coco/',
        ann_file=f'annotations/{split}.json',
        data_prefix=dict(img='val2017/'),
    )
    for step in dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (size, size)
        elif step.type == 'Pad':
            del step['pad_to_square']
            step.size_divisor = 32
    loader = dict(batch_size=1, num_workers=0, persistent_workers=False)
    for name in ('val', 'test'):
        cfg[f'{name}_dataloader'].update(loader, dataset=dataset)
    if settings:
        detector = cfg.model
        cfg.model = dict(
            type='DynamicDetector',
            detector=detector,
            backbone=detector.backbone,
            backbones=1,
            reuse_stages=0,
            first_scale=SIZES[0] / DELIVERED,
            **settings,
        )
    return cfg


def weights(data: Path) -> str:
    """The published weights."""
    return str(data / 'weights' / 'yolox_nano_mmdet.pth')


def make_record(args: argparse.Namespace, split: str):
    """Every picture of a split through both exits."""
    path = args.out / f'{split}.npz'
    if not path.exists():
        init_default_scope('mmdet')
        cfg = load_config(args.data, split, shared=True)
        model, _ = load_detector(cfg, weights(args.data), plain=True)
        loader = build_record_loader(cfg, 'test')
        record = record_data_set(model, cfg, loader, progress, 'none', weights(args.data))
        write_record(record, path)
    return read_record(path)


def make_plain(args: argparse.Namespace, size: int) -> Point:
    """The plain detector at a size, on the test split."""
    path = args.out / f'plain_{size}.npz'
    if not path.exists():
        cfg = load_config(args.data, 'test', size)
        model, _ = load_detector(cfg, weights(args.data))
        write_point(run(model, cfg, path.stem), path)
    return read_point(path)


@torch.no_grad()
def run(model: torch.nn.Module, cfg: Config, what: str) -> Point:
    """Mean GFLOPs and detections of a detector on its test data, one picture at a time."""
    loader, rows, gflops = build_loader(cfg.test_dataloader), [], []
    for batch in progress(loader, what):
        flops, samples = count_flops(lambda: model.test_step(batch))
        gflops.append(flops / 1e9)
        rows += detection_arrays(samples, loader.dataset.cat_ids)
    return Point(float(np.mean(gflops)), Detections.join(rows))


def write_point(point: Point, path: Path) -> None:
    """As `read_point` reads it."""
    np.savez(path, gflops=point.gflops, **vars(point.detections))


def read_point(path: Path) -> Point:
    """A point from its file."""
    with np.load(path) as file:
        parts = {name: file[name] for name in ('boxes', 'scores', 'categories', 'offsets')}
        return Point(float(file['gflops']), Detections(**parts))


if __name__ == '__main__':
    main()
