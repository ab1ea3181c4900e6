"""Large aerial pictures: AP and seconds of regions beside all slices, ours and SAHI's.

    python experiments/real_large.py --data PICTURES --out DIR

after experiments/real_large_detector.py with the same folders. SAHI is a dependency of this
experiment alone: run it where ``pip install sahi`` was run, too. One YOLOX-nano is everything: plain
at two sizes, on slices, and both exits of a dynamic detector, which sees a picture at 640 pixels
first. Prices come from ``val.json``, figures are of ``test.json``. Each picture goes through all
methods in turn, on one thread, some rounds, and is not done again.
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from real_tuning import STOCK, nano

from dynamicdet.apis import DynamicInferencer
from dynamicdet.building import build_loader, load_detector
from dynamicdet.configs import full_size
from dynamicdet.measuring.recording import build_record_loader, record_data_set
from dynamicdet.measuring.region_calibration import calibrate_regions
from dynamicdet.progress import progress
from dynamicdet.routing.bootstrap import bootstrap_weights
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import Detections, RoutingRecord, read_record, write_record
from dynamicdet.routing.region_record import cell_gains
from dynamicdet.routing.regions import (
    choose_rectangles,
    price_curve,
    price_of_threshold,
    threshold_for_area,
)
from mmdet.apis import DetInferencer

#: The longest side at which exit 0 sees a picture, and that of the plain detector besides.
FIRST, SECOND = 640, 1280
#: Of slices, SAHI's and ours.
SLICES = (512, 640)
#: Shares of the pixels that are looked at again.
SHARES = (0.05, 0.15, 0.3)
REGIONS = dict(first_size=FIRST, limit=16, halo=2)
#: Resamples of the pictures, and their seed.
RESAMPLES, SEED = 500, 0

#: A picture as cv2.imread gives it to boxes, (D, 4), and scores, (D,).
Method = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of pictures')
    parser.add_argument('--out', type=Path, required=True, help='folder with the detector')
    parser.add_argument('--rounds', type=int, default=3, help='of each method on each picture: 3')
    parser.add_argument('--json', type=Path, help='file for the figures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    init_default_scope('mmdet')
    truth = read_truth(str(args.out / 'test.json'))
    measure(args, truth)
    figures = summary(args, truth)
    for line in table(figures):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + '\n')


def load_config(
    args: argparse.Namespace, split: str, size: int | None = None, **settings
) -> Config:
    """The detector, plain at a size or, with settings, dynamic at full size, on a split."""
    cfg = get_config(STOCK)
    cfg.model = nano(1)
    dataset = cfg.test_dataloader.dataset
    dataset.update(
        data_root='',
        ann_file=str(args.out / f'{split}.json'),
        data_prefix=dict(img=f'{args.data}/'),
        metainfo=dict(classes=('vehicle',)),
    )
    for step in dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (size or FIRST, size or FIRST)
        elif step.type == 'Pad':
            del step['pad_to_square']
            step.size_divisor = 32
    if size is None:
        dataset.pipeline = full_size(dataset.pipeline)
        detector = cfg.model
        cfg.model = dict(
            type='DynamicDetector',
            detector=detector,
            backbone=detector.backbone,
            backbones=1,
            reuse_stages=0,
            shared=True,
            **settings,
        )
    loader = dict(batch_size=1, num_workers=0, persistent_workers=False)
    for name in ('val', 'test'):
        cfg[f'{name}_dataloader'].update(copy.deepcopy(loader), dataset=copy.deepcopy(dataset))
    cfg.custom_imports = dict(imports=['dynamicdet'])
    return cfg


def checkpoint(args: argparse.Namespace) -> str:
    """The fine-tuned detector's."""
    return str(args.out / 'detector.pth')


def dynamic(args: argparse.Namespace, tile: int | None = None, **settings) -> DynamicInferencer:
    """A dynamic detector with prices from the validation part."""
    path = args.out / 'regions.pth'
    if not path.exists():
        cfg = load_config(args, 'val', regions=REGIONS)
        model, _ = load_detector(cfg, checkpoint(args), plain=True)
        calibrate_regions(model, build_loader(cfg.val_dataloader), progress)
        meta = dict(dataset_meta=dict(classes=('vehicle',)))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    regions = REGIONS if tile is None else dict(REGIONS, tile=tile)
    cfg = load_config(args, 'test', regions=regions, **settings)
    return DynamicInferencer(cfg, str(path), device='cpu', full_size=True, show_progress=False)


def record(args: argparse.Namespace, split: str) -> RoutingRecord:
    """Every picture of a split through both exits, as a whole."""
    path = args.out / f'{split}.npz'
    if not path.exists():
        cfg = load_config(args, split, regions=REGIONS)
        model, _ = load_detector(cfg, checkpoint(args), plain=True)
        loader = build_record_loader(cfg, 'test')
        write_record(record_data_set(model, cfg, loader, progress, 'none', checkpoint(args)), path)
    return read_record(path)


def arrays(result: dict) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores of an inferencer's prediction."""
    (detected,) = result['predictions']
    return np.array(detected['bboxes'], float).reshape(-1, 4), np.array(detected['scores'], float)


def plain(args: argparse.Namespace, size: int) -> Method:
    """The plain detector at a size."""
    path = args.out / f'plain_{size}.py'
    load_config(args, 'test', size).dump(path)
    detector = DetInferencer(str(path), checkpoint(args), device='cpu', show_progress=False)
    return lambda picture: arrays(detector(picture))


def sahi(args: argparse.Namespace, side: int, least: float, **settings) -> Method:
    """SAHI's sliced prediction: overlaps of a fifth, the whole picture besides, scores from one."""
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    path = args.out / f'plain_{side}.py'
    load_config(args, 'test', side).dump(path)
    model = AutoDetectionModel.from_pretrained(
        model_type='mmdet',
        model_path=checkpoint(args),
        config_path=str(path),
        confidence_threshold=least,
        image_size=side,
        device='cpu',
    )

    def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        detected = get_sliced_prediction(
            picture[:, :, ::-1],
            model,
            slice_height=side,
            slice_width=side,
            overlap_height_ratio=0.2,
            overlap_width_ratio=0.2,
            verbose=0,
            **settings,
        ).object_prediction_list
        boxes = np.array([item.bbox.to_xyxy() for item in detected], float).reshape(-1, 4)
        return boxes, np.array([item.score.value for item in detected], float)

    return detect


class Methods:
    """Everything that is compared, by name. Detectors are built once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.every: dict[str, Method] = {
            f'plain, {size}': plain(args, size) for size in (FIRST, SECOND)
        }
        for side in SLICES:
            self.every[f'SAHI, {side}, NMS'] = sahi(
                args, side, 0.01, postprocess_type='NMS', postprocess_match_metric='IOU'
            )
            self.every[f'SAHI, {side}, GREEDYNMM from 0.1'] = sahi(args, side, 0.1)
        for side in SLICES:
            detector = dynamic(args, side)
            self.every[f'all tiles, {side}'] = self.at(detector, threshold=0)
        detector = dynamic(args)
        for share in SHARES:
            self.every[f'regions, {share:g}'] = self.at(detector, hard_share=share)
        #: The true gains' rectangles of the picture that comes, at each share.
        self.oracle = dynamic(args)
        for share in SHARES:
            self.every[f'true gains, {share:g}'] = self.chosen(share)
        self.rectangles: dict[float, list] = {}

    @staticmethod
    def at(detector: DynamicInferencer, **budget: float) -> Method:
        """A dynamic detector at a budget."""
        return lambda picture: arrays(detector(picture, **budget))

    def chosen(self, share: float) -> Method:
        """It with the rectangles that true gains would choose."""

        def detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            self.oracle.model.regions.choose = lambda gains, threshold: self.rectangles[share]
            return arrays(self.oracle(picture, threshold=0.5))

        return detect


def true_rectangles(args: argparse.Namespace) -> dict[float, list]:
    """What true gains would choose of each test picture, at prices of the validation part's."""
    maps = {}
    for split in ('val', 'test'):
        truth = read_truth(str(args.out / f'{split}.json'))
        maps[split] = cell_gains(record(args, split), truth, [1], np.ones(1))
    settings = dict(halo=REGIONS['halo'], limit=REGIONS['limit'])
    curve, chosen = price_curve(maps['val'], **settings), {}
    for share in SHARES:
        price = price_of_threshold(threshold_for_area(curve, share))
        chosen[share] = [choose_rectangles(group, price, **settings) for group in maps['test']]
    return chosen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without SAHI's warnings of each picture."""
    import logging

    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def measure(args: argparse.Namespace, truth) -> None:
    """What each method finds in each picture, and how long it takes."""
    images = list(truth.imgs.values())
    missing = [item for item in images if not picture_file(args, item).exists()]
    if not missing:
        return
    rectangles = true_rectangles(args)
    methods = Methods(args)
    row_of = {item['id']: row for row, item in enumerate(images)}
    with quiet():
        # The first call of each warms up.
        picture = cv2.imread(str(args.data / images[0]['file_name']))
        for item in missing:
            methods.rectangles = {
                share: group[row_of[item['id']]] for share, group in rectangles.items()
            }
            if item is missing[0]:
                for method in methods.every.values():
                    method(picture)
            picture = cv2.imread(str(args.data / item['file_name']))
            seconds, detected = {name: [] for name in methods.every}, {}
            for _ in range(args.rounds):
                for name, method in methods.every.items():
                    begin = time.perf_counter()
                    boxes, scores = method(picture)
                    seconds[name].append(time.perf_counter() - begin)
                    detected.setdefault(name, dict(boxes=boxes.tolist(), scores=scores.tolist()))
            done = dict(seconds=seconds, detected=detected)
            picture_file(args, item).write_text(json.dumps(done))
            medians = {name: round(statistics.median(group), 2) for name, group in seconds.items()}
            print(item['file_name'], medians, flush=True)


def picture_file(args: argparse.Namespace, image: dict) -> Path:
    """Where a picture's results are."""
    folder = args.out / 'pictures'
    folder.mkdir(exist_ok=True)
    return folder / f'{image["file_name"]}.json'


def summary(args: argparse.Namespace, truth) -> dict:
    """AP, seconds and their intervals of each method."""
    images = list(truth.imgs.values())
    done = [json.loads(picture_file(args, item).read_text()) for item in images]
    names = list(done[0]['detected'])
    every = []
    for name in names:
        rows = []
        for group in done:
            boxes = np.array(group['detected'][name]['boxes'], float).reshape(-1, 4)
            boxes[:, 2:] -= boxes[:, :2]
            scores = np.array(group['detected'][name]['scores'], float)
            rows.append((boxes, scores, np.ones(len(scores), int)))
        every.append(Detections.join(rows))
    seconds = np.array(
        [[statistics.median(group['seconds'][name]) for name in names] for group in done]
    )
    ids, nothing = np.array([item['id'] for item in images]), [0.0] * len(names)
    files = [item['file_name'] for item in images]
    mixtures = Mixtures(
        RoutingRecord(ids, files, np.zeros(len(ids)), every, nothing, nothing, {}), truth
    )
    ones = np.ones((1, len(ids)), np.int64)
    weights = np.concatenate([ones, bootstrap_weights(len(ids), RESAMPLES, SEED)])
    aps = np.array(
        [[mixtures.ap(np.full(len(ids), k), group) for k in range(len(names))] for group in weights]
    )
    peer = names.index(f'SAHI, {SLICES[0]}, NMS')
    less = aps - aps[:, [peer]]
    share = (weights @ seconds) / (weights @ seconds)[:, [peer]]
    methods = {}
    for k, name in enumerate(names):
        methods[name] = dict(
            ap=aps[0, k],
            seconds=float(seconds[:, k].mean()),
            less_ap=[less[0, k], *np.percentile(less[1:, k], (2.5, 97.5))],
            share_of_seconds=[share[0, k], *np.percentile(share[1:, k], (2.5, 97.5))],
        )
    pixels = float(np.mean([item['width'] * item['height'] for item in images]) / 1e6)
    facts = dict(pictures=len(images), objects=len(truth.anns), megapixels=pixels, peer=names[peer])
    return json.loads(
        json.dumps(dict(facts, methods=methods)), parse_float=lambda x: round(float(x), 3)
    )


def table(figures: dict) -> list[str]:
    """A line for each method."""
    lines = ['| | AP | seconds | AP above | of its time |', '|---|---|---|---|---|']
    for name, group in figures['methods'].items():
        mean, low, high = group['less_ap']
        lines.append(
            f'| {name} | {group["ap"]:.1f} | {group["seconds"]:.2f} | {mean:+.1f} ({low:+.1f} to '
            f'{high:+.1f}) | {group["share_of_seconds"][0]:.0%} |'
        )
    return lines


if __name__ == '__main__':
    main()
