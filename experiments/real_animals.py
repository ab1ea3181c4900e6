"""Real animals: a published YOLOX-nano, tuned to seven classes of 560 pictures, at six sizes, routed between two
of them, merged, and with regions.

    python experiments/real_animals.py DATA work_dirs/real_animals --weights WEIGHTS --json real_animals.json

DATA is a folder of pictures in COCO format, train, val and test, and WEIGHTS the plain detector's on COCO. Every
fifth picture of train is kept from training: figures are of those and of the test pictures. Routers, maps and prices
are of val. Each step leaves its result, and is not done again.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from real_tuning import STOCK, Picture, nano, tune
from steps import run

from dynamicdet import cli
from dynamicdet.building import build_loader, load_detector, load_dynamic_detector
from dynamicdet.files import write_atomically
from dynamicdet.measuring.calibration import detection_arrays
from dynamicdet.measuring.flops import count_flops
from dynamicdet.measuring.make_dynamic import resized
from dynamicdet.models import fuse
from dynamicdet.progress import progress
from dynamicdet.routing.bootstrap import bootstrap_weights, confidence_interval
from dynamicdet.routing.evaluation import Mixtures, read_truth
from dynamicdet.routing.record import Detections, RoutingRecord
from dynamicdet.timing import machine_of, time_call

#: Every so many pictures of train are kept for figures.
HELD = 5
#: Longer side of a delivered picture, a multiple of the stride.
LARGEST, STRIDE = 480, 32
#: From which of COCO's classes each of the seven starts: bear, cow, elephant, dog, dog, cat, bird.
ORIGINS = (21, 19, 20, 16, 16, 15, 14)
#: Of the plain detector; and of the exits of dynamic ones.
SIZES, PAIRS = (256, 320, 416, 480, 544, 640), ((256, 416), (320, 640))
#: How dynamic detectors are made, and the budgets that they are given: shares of hard pictures, or of pixels.
KINDS = dict(routed=(), merged=('--merge', 'wbf'), regions=('--regions', '--merge', 'nms'))
SHARES = dict(routed=(0.25, 0.5, 0.75), merged=(0.25, 0.5, 0.75), regions=(0.1, 0.25))
#: Resamples of the pictures; pictures that are timed, and how often.
RESAMPLES, TIMED, ROUNDS = 500, 40, 3
LOAD = (dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True))
PAD = dict(pad_val=dict(img=(114.0, 114.0, 114.0)))


def split_pictures(data: Path, out: Path) -> dict[str, Path]:
    """Annotation files with absolute paths: 'train', 'val', and 'figures', of test and what is kept of train."""
    source = {
        split: json.loads((data / 'annotations' / f'{split}.json').read_text())
        for split in ('train', 'val', 'test')
    }
    for split, content in source.items():
        for image in content['images']:
            image['file_name'] = str((data / split / image['file_name']).resolve())
    # A picture that two splits have under names that differ in their end is of val alone.
    known = {_stem(image) for image in source['val']['images']}
    images = [image for image in source['train']['images'] if _stem(image) not in known]
    kept = images[::HELD]
    parts = dict(
        train=_subset(source['train'], [image for image in images if image not in kept]),
        val=source['val'],
        figures=_joined(source['test'], _subset(source['train'], kept)),
    )
    paths = {}
    for name, content in parts.items():
        paths[name] = (out / f'{name}.json').absolute()
        if not paths[name].exists():
            write_atomically(json.dumps(content).encode(), paths[name])
    return paths


def _stem(image: dict) -> str:
    return Path(image['file_name']).name.split('.rf.')[0]


def _subset(content: dict, images: Sequence[dict]) -> dict:
    ids = {image['id'] for image in images}
    annotations = [box for box in content['annotations'] if box['image_id'] in ids]
    return dict(content, images=list(images), annotations=annotations)


def _joined(first: dict, second: dict) -> dict:
    """Two files' content as one, ids anew."""
    images, annotations = [], []
    for content in (first, second):
        ids = {image['id']: len(images) + at for at, image in enumerate(content['images'], 1)}
        images += [dict(image, id=ids[image['id']]) for image in content['images']]
        annotations += [
            dict(box, image_id=ids[box['image_id']], id=len(annotations) + at)
            for at, box in enumerate(content['annotations'], 1)
        ]
    return dict(first, images=images, annotations=annotations)


def classes_of(path: Path) -> tuple[str, ...]:
    """Names of a file's categories."""
    return tuple(category['name'] for category in json.loads(path.read_text())['categories'])


def write_plain_config(args: argparse.Namespace, paths: dict[str, Path]) -> None:
    """The stock detector's config, for these classes and pictures."""
    cfg = cli.read_config(STOCK)
    classes = classes_of(paths['train'])
    cfg.model = nano(len(classes))
    for split in ('val', 'test'):
        ann_file = str(paths['figures' if split == 'test' else 'val'])
        cfg[f'{split}_dataloader'] = dict(
            batch_size=1,
            num_workers=0,
            persistent_workers=False,
            drop_last=False,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                metainfo=dict(classes=classes),
                data_prefix=dict(img=''),
                ann_file=ann_file,
                test_mode=True,
                pipeline=[
                    LOAD[0],
                    dict(type='Resize', scale=(LARGEST, LARGEST), keep_ratio=True),
                    dict(type='Pad', size_divisor=STRIDE, **PAD),
                    LOAD[1],
                    dict(
                        type='PackDetInputs',
                        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                    ),
                ],
            ),
        )
        cfg[f'{split}_evaluator'] = dict(type='CocoMetric', ann_file=ann_file, metric='bbox')
    cfg.custom_imports = dict(imports=['dynamicdet'], allow_failed_imports=False)
    cfg.dump(args.out / 'plain.py')


def train(args: argparse.Namespace, paths: dict[str, Path]) -> str:
    """The tuned plain detector's checkpoint."""
    write_plain_config(args, paths)
    truth = read_truth(str(paths['train']))
    label_of = {category: label for label, category in enumerate(sorted(truth.getCatIds()))}
    images = list(truth.imgs.values())

    def draw(random: np.random.Generator) -> Picture:
        image = images[random.integers(len(images))]
        objects = truth.imgToAnns[image['id']]
        boxes = np.array([item['bbox'] for item in objects], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([label_of[item['category_id']] for item in objects], int)
        return cv2.imread(image['file_name']), boxes, labels

    out = (args.out / 'plain.pth').absolute()
    tune(
        args.weights,
        ORIGINS,
        classes_of(paths['train']),
        draw,
        out,
        steps=args.steps,
        seed=args.seed,
        least=SIZES[0],
    )
    return str(out)


class Point(NamedTuple):
    """A way to run: GFLOPs of each picture, (n,), and what was found."""

    gflops: np.ndarray
    detections: Detections


def plain_config(args: argparse.Namespace, size: int) -> Config:
    """The tuned detector on the pictures of the figures at a size."""
    cfg = Config.fromfile(args.out / 'plain.py')
    dataset = cfg.test_dataloader.dataset
    dataset.pipeline = resized(dataset.pipeline, size)
    cfg.model.data_preprocessor.batch_augments = None
    return cfg


@torch.no_grad()
def run_through(model: torch.nn.Module, loader) -> Point:
    """Every picture, one at a time, by its real GFLOPs."""
    rows, gflops = [], []
    for batch in progress(loader, 'pictures'):
        flops, samples = count_flops(lambda: model.test_step(batch))
        gflops.append(flops / 1e9)
        rows += detection_arrays(samples, loader.dataset.cat_ids)
    return Point(np.array(gflops), Detections.join(rows))


def keep(path: Path, make: Callable[[], Point]) -> Point:
    """A point from its file, made if there is none."""
    if not path.exists():
        point = make()
        arrays = dict(gflops=point.gflops, **vars(point.detections))
        write_atomically(lambda file: np.savez(file, **arrays), path)
    with np.load(path) as file:
        parts = {name: file[name] for name in ('boxes', 'scores', 'categories', 'offsets')}
        return Point(file['gflops'], Detections(**parts))


def load_plain(args: argparse.Namespace, checkpoint: str, size: int) -> tuple:
    """The tuned detector at a size, fused, and the pictures of the figures."""
    cfg = plain_config(args, size)
    model, _ = load_detector(cfg, checkpoint)
    return fuse(model), build_loader(cfg.test_dataloader)


def make_dynamic(
    args: argparse.Namespace, checkpoint: str, pair: tuple[int, int], kind: str
) -> Path:
    """A dynamic detector by the tool, as users make it, from the validation pictures."""
    out = args.out / f'{kind}_{pair[0]}_{pair[1]}.pth'
    if not out.exists():
        run(
            'tools/make_dynamic.py',
            str((args.out / 'plain.py').absolute()),
            checkpoint,
            f'--data={args.data.absolute()}',
            f'--out={out.absolute()}',
            *('--exits', *map(str, pair)),
            *('--view', 'none', '--workers', '0', '--device', 'cpu', '--seed', str(args.seed)),
            *KINDS[kind],
            log=args.out / f'{out.stem}.log',
        )
    return out


def load_dynamic(args: argparse.Namespace, path: Path, figures: Path) -> tuple:
    """The detector, its config and the pictures of the figures."""
    cfg = Config.fromfile(path.with_suffix('.py'))
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.update(ann_file=str(figures), data_prefix=dict(img=''))
    model, _ = load_dynamic_detector(cfg, str(path), 'cpu')
    return model, cfg, build_loader(cfg.test_dataloader)


def points_of(
    args: argparse.Namespace, checkpoint: str, paths: dict[str, Path]
) -> dict[str, Point]:
    """Everything that is compared, by name."""
    points = {}
    for size in SIZES:
        points[f'plain at {size}'] = keep(
            args.out / f'plain_{size}.npz', lambda: run_through(*load_plain(args, checkpoint, size))
        )
    for pair, kind in itertools.product(PAIRS, KINDS):
        path = make_dynamic(args, checkpoint, pair, kind)
        for share in SHARES[kind]:
            name = f'{kind}, {pair[0]} and {pair[1]}, {share:.0%}'

            def served(share=share, path=path) -> Point:
                model, _, loader = load_dynamic(args, path, paths['figures'])
                model.set_budget(hard_share=share)
                return run_through(model, loader)

            points[name] = keep(args.out / f'{path.stem}_{share:g}.npz', served)
    return points


@torch.no_grad()
def seconds_of(
    args: argparse.Namespace, checkpoint: str, paths: dict[str, Path]
) -> dict[str, float]:
    """Mean over pictures of the median seconds of a picture, ways taking turns: one thread, eager, batch 1."""
    path = args.out / 'seconds.json'
    if path.exists():
        return json.loads(path.read_text())
    runs: dict[str, tuple] = {}
    for size in SIZES:
        model, loader = load_plain(args, checkpoint, size)
        runs[f'plain at {size}'] = model, loader.dataset, None
    for pair, kind in itertools.product(PAIRS, KINDS):
        model, _, loader = load_dynamic(
            args, make_dynamic(args, checkpoint, pair, kind), paths['figures']
        )
        for share in SHARES[kind]:
            runs[f'{kind}, {pair[0]} and {pair[1]}, {share:.0%}'] = model, loader.dataset, share
    rows = np.random.default_rng(args.seed).permutation(len(loader.dataset))[:TIMED]
    means = dict.fromkeys(runs, 0.0)
    for row in progress(rows.tolist(), 'seconds'):
        batches: dict = {}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS + 1):
            for name, (model, dataset, share) in runs.items():
                batch = batches.setdefault(id(dataset), pseudo_collate([dataset[row]]))
                if share is not None:
                    model.set_budget(hard_share=share)
                times[name].append(
                    time_call(lambda: model.test_step(batch), torch.device('cpu'))[0]
                )
        for name, every in times.items():
            means[name] += float(np.median(every[1:])) / len(rows)
    write_atomically(json.dumps(means).encode(), path)
    return means


def summarize(
    points: dict[str, Point], seconds: dict[str, float], figures: Path, seed: int
) -> dict:
    """AP, GFLOPs and seconds of each way; with 95 % intervals, paired over pictures, how far it is from the plain
    detector at full size, and from plain detectors that cost as much."""
    truth = read_truth(str(figures))
    ids = np.array(sorted(truth.imgs))
    every = [point.detections for point in points.values()]
    nothing = [0.0] * len(every)
    record = RoutingRecord(ids, [''] * len(ids), np.zeros(len(ids)), every, nothing, nothing, {})
    mixtures = Mixtures(record, truth)
    draws = bootstrap_weights(len(ids), RESAMPLES, seed)
    weights = np.concatenate([np.ones((1, len(ids)), int), draws])
    aps = np.array(
        [[mixtures.ap(np.full(len(ids), k), draw) for k in range(len(every))] for draw in weights]
    )
    gflops = np.array([weights @ point.gflops / len(ids) for point in points.values()]).T
    names, plain = list(points), len(SIZES)
    full = plain - 1
    rows = {}
    for k, name in enumerate(names):
        front = np.array(
            [np.interp(cost[k], cost[:plain], ap[:plain]) for ap, cost in zip(aps, gflops)]
        )
        rows[name] = dict(
            ap=float(aps[0, k]),
            ap_interval=confidence_interval(aps[1:, k]),
            gflops=float(gflops[0, k]),
            seconds=seconds[name],
            gflops_saved=float(1 - gflops[0, k] / gflops[0, full]),
            seconds_saved=float(1 - seconds[name] / seconds[names[full]]),
            above_full=float(aps[0, k] - aps[0, full]),
            above_full_interval=confidence_interval(aps[1:, k] - aps[1:, full]),
            above_front=float(aps[0, k] - front[0]),
            above_front_interval=confidence_interval(aps[1:, k] - front[1:]),
        )
    files = [Path(image['file_name']).name for image in truth.dataset['images']]
    return dict(
        pictures=len(ids),
        seen_by_the_weights=sum(bool(re.match('0{4}[0-9]{8}_', file)) for file in files),
        objects=len(truth.anns),
        machine=machine_of('cpu'),
        torch=str(torch.__version__),
        rows=rows,
    )


def table(summary: dict) -> list[str]:
    """The summary as Markdown."""
    lines = [
        '| | GFLOPs | ms | AP | above full size | saved: GFLOPs, time | above plain of equal GFLOPs |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in summary['rows'].items():
        full, front = (
            f'{row[key]:+.1f} ({row[f"{key}_interval"][0]:+.1f} to {row[f"{key}_interval"][1]:+.1f})'
            for key in ('above_full', 'above_front')
        )
        saved = f'{row["gflops_saved"]:.0%}, {row["seconds_saved"]:.0%}'
        lines.append(
            f'| {name} | {row["gflops"]:.2f} | {1e3 * row["seconds"]:.0f} | {row["ap"]:.1f} | {full} | {saved} | '
            f'{"" if name.startswith("plain") else front} |'
        )
    return lines


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, help='folder with annotations, train, val and test')
    parser.add_argument('out', type=Path, help='folder for results')
    parser.add_argument(
        '--weights', type=Path, required=True, help='published weights of YOLOX-nano'
    )
    parser.add_argument('--json', type=Path, help='file for the summary')
    parser.add_argument('--steps', type=int, default=400, help='of training, of 8 crops: 400')
    parser.add_argument('--seed', type=int, default=0, help='of training and resamples: 0')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = split_pictures(args.data, args.out)
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    checkpoint = train(args, paths)
    points = points_of(args, checkpoint, paths)
    seconds = seconds_of(args, checkpoint, paths)
    summary = summarize(points, seconds, paths['figures'], args.seed)
    print(*table(summary), sep='\n')
    if args.json:
        write_atomically(json.dumps(summary, indent=1).encode(), args.json)


if __name__ == '__main__':
    cli.run(main)
