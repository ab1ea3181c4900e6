"""Regions on real pictures: AP against GFLOPs, simulated on a record and with real crops, beside a
plain detector at four sizes.

    python experiments/real_regions.py --data ../shared/real --out work_dirs/real_regions

One YOLOX-nano with published weights is both exits, at 320 and 640 pixels. ``router.json`` fits the
map and the prices, ``test.json`` is what figures are of. Each step leaves its result, and is not
done again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from dynamicdet.building import build_loader, load_detector
from dynamicdet.measuring.calibration import detected
from dynamicdet.measuring.flops import count_flops
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.progress import progress
from dynamicdet.routing.curve import bootstrap_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.merging import Merge
from dynamicdet.routing.record import Detections, read_record, write_record
from dynamicdet.routing.region_maps import class_weights
from dynamicdet.routing.region_record import (
    cell_gains,
    objects_by_class,
    planes_of,
    region_gflops,
    share_of_pixels,
    simulate_regions,
)
from dynamicdet.routing.regions import (
    choose_rectangles,
    price_curve,
    price_of_threshold,
    threshold_for_area,
)

STOCK = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
#: Sizes of the plain detector, and of the delivered image.
SIZES, DELIVERED = (320, 416, 512, 640), 640
#: Shares of the pixels that are looked at again.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of real pictures')
    parser.add_argument('--out', type=Path, required=True, help='folder for records and results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    records = {split: make_record(args, split) for split in ('router', 'test')}
    plain = make_plain(args)
    print(plain)


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


def make_plain(args: argparse.Namespace) -> dict[int, tuple[float, Detections]]:
    """Mean GFLOPs and detections of the plain detector at each size, on the test split."""
    found = {}
    for size in SIZES:
        path = args.out / f'plain_{size}.npz'
        if not path.exists():
            init_default_scope('mmdet')
            cfg = load_config(args.data, 'test', size)
            model, _ = load_detector(cfg, weights(args.data))
            rows, gflops, known = [], [], {}
            loader = build_loader(cfg.test_dataloader)
            for batch in progress(loader, f'plain {size}'):
                shape = tuple(batch['inputs'][0].shape)
                with torch.no_grad():
                    flops, samples = (
                        (known[shape], model.test_step(batch))
                        if shape in known
                        else count_flops(lambda: model.test_step(batch))
                    )
                known[shape] = flops
                gflops.append(flops / 1e9)
                rows += detected(samples, loader.dataset.cat_ids)
            one = Detections.join(rows)
            np.savez(path, gflops=np.mean(gflops), **dataclasses.asdict(one))
        with np.load(path) as file:
            parts = {name: file[name] for name in ('boxes', 'scores', 'categories', 'offsets')}
            found[size] = float(file['gflops']), Detections(**parts)
    return found


if __name__ == '__main__':
    main()
