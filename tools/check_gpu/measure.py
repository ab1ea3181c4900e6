"""Measurements of tools/check_gpu.sh, each in a process of its own: measure.py NAME [arguments].

Each is a generator: it yields its figures, which go to NAME.json, and then raises if they are not
as they must be.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from steps import ON_TRAINING_PICTURES

from dynamicdet import cli
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.deploy.folder import load_deployed
from dynamicdet.measuring.benchmark import (
    BenchmarkTask,
    MachineSetting,
    build_pair,
    make_batch,
    quartiles,
    split_batch,
    time_interleaved,
)
from dynamicdet.measuring.calibration import record_exits
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.routing.evaluation import evaluate, mixed_results, read_truth
from dynamicdet.routing.record import RoutingRecord
from dynamicdet.routing.thresholds import ALL_EASY, ALL_HARD
from dynamicdet.testing import agreement, count_waits, randomize

ROOT = Path(__file__).resolve().parents[2]
#: Real sizes, by batch and pixels; and small ones, for a machine without a GPU.
REAL = (('configs/dy_faster_rcnn.py', (800, 1344)), ('configs/dy_yolox_s.py', (640, 640)))
SMALL = (
    ('configs/dy_faster_rcnn_digits.py', (128, 128)),
    ('configs/dy_yolox_nano_digits.py', (128, 128)),
)
Figures = Iterator[dict[str, Any]]


def quiet(steps: Any, what: str) -> Any:
    """Steps as they are, without a progress bar."""
    return steps


class Disagreement(Exception):
    """Detections of two sides differ by more than rounding explains."""


# Detections.


def record(cfg: Config, model: torch.nn.Module) -> RoutingRecord:
    """All exits' detections of the test set."""
    settings = copy.deepcopy(cfg.test_dataloader)
    settings.update(num_workers=0, persistent_workers=False)
    with cli.silence():
        loader = build_loader(settings)
    return record_exits(model, loader, quiet)


def compare_exits(cfg: Config, one: RoutingRecord, other: RoutingRecord) -> dict[str, dict]:
    """AP of both sides and how far they agree, of each exit."""
    truth, rows = read_truth(cfg.test_evaluator.ann_file), {}
    for exit in range(one.exits):
        aps = [
            evaluate(truth, mixed_results(side, [exit] * len(side)))['ap'] for side in (one, other)
        ]
        rows[f'exit {exit}'] = compare_detections(
            *(side.detections[exit] for side in (one, other)), aps
        )
    return rows


def compare_detections(
    ones: Sequence[list[dict]],
    others: Sequence[list[dict]],
    aps: Sequence[float | None] = (None, None),
) -> dict:
    """How far detections agree by image, and both APs, as a row of the results."""
    return dict(agreement(ones, others)._asdict(), ap=list(aps))


def require_agreement(
    rows: Mapping[str, dict], box: float, score: float, unmatched: float = 0.02, ap: float = 1.0
) -> None:
    """Raise a `Disagreement` for rows whose boxes, scores, pairs or AP differ by more."""
    for name, own in rows.items():
        if not own['detections']:
            raise Disagreement(f'{name}: nothing was detected, so nothing was compared')
        for key, most in dict(box=box, score=score, unmatched=unmatched).items():
            if own[key] > most:
                raise Disagreement(
                    f'{name}: {key} differs by {own[key]:.4g}, and {most} is rounding'
                )
        if None not in own['ap'] and abs(own['ap'][0] - own['ap'][1]) > ap:
            raise Disagreement(f'{name}: AP {own["ap"][0]:.2f} and {own["ap"][1]:.2f}')


def load_config(name: str) -> Config:
    """A config as tools read it, tested on training pictures."""
    return cli.load_config(
        argparse.Namespace(
            config=name, cfg_options=dict(option.split('=') for option in ON_TRAINING_PICTURES)
        )
    )


def compare(config: str, checkpoint: str) -> Figures:
    """A checkpoint's detections on the GPU and on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    cfg = load_config(config)
    records = [
        record(cfg, load_dynamic_detector(copy.deepcopy(cfg), checkpoint, device)[0])
        for device in ('cpu', 'cuda')
    ]
    rows = compare_exits(cfg, *records)
    difficulty = float(np.abs(records[0].difficulty - records[1].difficulty).max())
    yield dict(title='CPU and GPU', rows=rows, difficulty=difficulty)
    require_agreement(rows, box=0.1, score=0.005)
    if difficulty > 1e-3:
        raise Disagreement(f'difficulties differ by {difficulty:.4g}')


def compare_exported(config: str, checkpoint: str, folder: str, provider: str) -> Figures:
    """An exported detector's detections and those of torch on the CPU."""
    cfg = load_config(config)
    exact = record(cfg, load_dynamic_detector(copy.deepcopy(cfg), checkpoint, 'cpu')[0])
    rows = {}
    for name in dict.fromkeys(('CPUExecutionProvider', provider)):
        found = record(cfg, load_deployed(folder, providers=[name]))
        rows.update(
            {f'{exit}, {name}': own for exit, own in compare_exits(cfg, exact, found).items()}
        )
    yield dict(title='torch on the CPU and exported', rows=rows)
    # What ONNX Runtime computes on a GPU is rounded to TF32.
    require_agreement(rows, box=0.5, score=0.02)


def compare_video(one: str, other: str) -> Figures:
    """What tools/video_demo.py wrote twice."""
    frames = [
        [json.loads(line) for line in Path(path).read_text().splitlines()] for path in (one, other)
    ]
    same = [pair for pair in zip(*frames, strict=True) if pair[0]['exit'] == pair[1]['exit']]
    rows = dict(
        frames=compare_detections(*([in_coco(frame) for frame in side] for side in zip(*same)))
    )
    moved = len(frames[0]) - len(same)
    yield dict(title='video, GPU and CPU', rows=rows, other_exits=moved)
    require_agreement(rows, box=0.5, score=0.02)
    if moved > len(frames[0]) // 10:
        raise Disagreement(f'{moved} of {len(frames[0])} frames took another exit')


def in_coco(frame: dict) -> list[dict]:
    """A frame's detections, as COCO's results have them."""
    return [
        dict(bbox=found['bbox'], score=found['score'], category_id=found['label'])
        for found in frame['detections']
    ]


# Time.


def operators() -> Figures:
    """mmcv's operators on the GPU and the CPU."""
    from mmcv.ops import nms, roi_align

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 50
    boxes, scores = torch.cat([corners, corners + 10], 1), torch.rand(200, generator=generator)
    maps, rois = (
        torch.rand(1, 4, 64, 64, generator=generator),
        torch.cat([torch.zeros(200, 1), boxes], 1),
    )
    kept = [nms(boxes.to(device), scores.to(device), 0.5)[1].cpu() for device in ('cpu', 'cuda')]
    pooled = [
        roi_align(maps.to(device), rois.to(device), 7, 1.0, 2, 'avg', True).cpu()
        for device in ('cpu', 'cuda')
    ]
    yield dict(kept=len(kept[0]))
    if not torch.equal(*kept) or not torch.allclose(*pooled, atol=1e-4):
        raise Disagreement(
            "mmcv's nms or RoIAlign finds something else on the GPU: compile mmcv again for this "
            'torch'
        )


@torch.no_grad()
def syncs() -> Figures:
    """What makes the CPU wait, per image, at batch 1 and 8: of stock detectors, exits, and an
    early-exit detector."""
    waits: dict[str, dict] = {}
    places: dict[str, list] = {}
    for config, size in REAL:
        model, stock = build_pair(Config.fromfile(ROOT / config), device='cuda')
        name = Path(config).stem
        whole = make_batch(size, 8)
        for label, detector, exit in (
            (f'{name}, stock', stock, None),
            (f'{name}, exit 0', model, 0),
            (f'{name}, exit 1', model, 1),
        ):
            if exit is not None:
                force_dynamic_exit(model, exit)
            waits[label] = {}
            for batch in (split_batch(whole)[0], whole):
                count = len(batch['inputs'])
                detector.test_step(batch)
                lines = count_waits(lambda: detector.test_step(batch))
                waits[label][str(count)] = sum(lines.values()) / count
            places[label] = lines.most_common(8)
    waits['early exit, video'], places['early exit, video'] = video_waits()
    yield dict(waits=waits, places=places)
    for config, _ in REAL:
        name = Path(config).stem
        more = waits[f'{name}, exit 0']['1'] - waits[f'{name}, stock']['1']
        if more > 2:
            raise Disagreement(
                f'{name}: exit 0 waits {more:g} times more often than the stock detector'
            )


def video_waits() -> tuple[dict[str, float], list]:
    """How often an early-exit detector waits for the device, per frame, by batch; and where."""
    from mmdet.registry import MODELS

    cfg = Config.fromfile(ROOT / 'configs/video/early_exit_yolov5_s.py')
    cfg.model.gate = dict(type='ScoreGate')
    model = randomize(MODELS.build(cfg.model)).cuda().eval()
    model.set_budget(threshold=0.5)
    counts = {}
    for count in (1, 8):
        batch = make_batch((640, 640), count)
        for index, sample in enumerate(batch['data_samples']):
            sample.set_metainfo(dict(video_id=index, frame_id=0))
        model.test_step(batch)
        model.reset()
        lines = count_waits(lambda: model.test_step(batch))
        counts[str(count)] = sum(lines.values()) / count
    return counts, lines.most_common(8)


def timings(small: bool = False) -> Figures:
    """Exits against the stock detector, in turns."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    # mmcv's operators have no half precision on a CPU.
    dtype = 'float16' if device == 'cuda' else 'float32'
    setting, runs = MachineSetting(torch.get_num_threads(), dtype), []
    for config, size in SMALL if small else REAL:
        model, stock = build_pair(Config.fromfile(ROOT / config), device=device)
        for count in (1, 2) if small else (1, 16):
            batches = [make_batch(size, count)]
            tasks = dict(
                stock=BenchmarkTask(stock, batches),
                **{
                    'exit 0': BenchmarkTask(model, batches, ALL_EASY),
                    'exit 1': BenchmarkTask(model, batches, ALL_HARD),
                },
            )
            seconds = time_interleaved(
                {name: task._replace(setting=setting) for name, task in tasks.items()},
                6 if small else 12,
                quiet,
                '',
            )
            rows = {
                name: dict(
                    quartiles(1e3 * own / count), ratio=quartiles(own / seconds['stock'])['median']
                )
                for name, own in seconds.items()
            }
            runs.append(
                dict(
                    title=f'{Path(config).stem}, {size[0]} x {size[1]}, batch {count}, {dtype}, '
                    f'{device}',
                    rows=rows,
                )
            )
    yield dict(runs=runs)


MEASUREMENTS = {
    own.__name__: own
    for own in (operators, compare, compare_exported, compare_video, syncs, timings)
}


def main() -> int:
    """Run the measurement that the command line names; 1 if both sides disagree."""
    name, *arguments = sys.argv[1:]
    small = '--small' in arguments
    cli.prepare()
    torch.manual_seed(0)
    paths = [one for one in arguments if one != '--small']
    measurement = MEASUREMENTS[name](*paths, **dict(small=True) if small else {})
    Path(f'{name}.json').write_text(json.dumps(next(measurement)))
    try:
        next(measurement, None)
    except Disagreement as error:
        print(f'error: {error}')
        return 1
    return 0


if __name__ == '__main__':
    cli.run(main)
