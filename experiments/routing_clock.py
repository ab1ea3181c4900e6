"""What the detectors of the experiment on routing cost by the clock: plain ones at each size, and
exits.

    python experiments/routing_clock.py

On a machine that does nothing else. All detectors of a setting take turns in one process of one
thread, on the test images in memory, from preprocessing to boxes; those that are done are not
measured again. A setting leaves a file in experiments/results/routing_clock. Weights are those that
all runs start from, trained by experiments/routing.py where they are not in work_dirs/routing; how
long a detector takes hardly depends on how well it was trained.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from routing import WORK, make_data, train
from routing_runs import DATA, DETECTORS, DYNAMIC, SIZES, all_runs, data_options
from steps import ROOT

from dynamicdet import cli
from dynamicdet.building import build_loader
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import latest_checkpoint, write_atomically
from dynamicdet.measuring.benchmark import (
    BenchmarkTask,
    build_pair,
    half_hard_threshold,
    quartiles,
    time_interleaved,
)
from dynamicdet.measuring.calibration import provenance
from dynamicdet.measuring.flops import count_flops
from dynamicdet.routing.thresholds import ALL_EASY, ALL_HARD
from mmdet.registry import MODELS

RESULTS = ROOT / 'experiments' / 'results' / 'routing_clock'
#: Dynamic variants whose exits differ by resolution, with two backbones and with one.
VARIANTS = ('depth_resolution', 'own')


class Setting(NamedTuple):
    """Images as large as the experiment's, times ``scale``; so many at a time, and in all; timed
    rounds."""

    scale: int
    batch: int
    images: int
    rounds: int


#: The experiment's own images; the same in batches, where what is around the networks counts less;
#: and images of the size that users have.
SETTINGS = dict(small=Setting(1, 1, 20, 15), batch=Setting(1, 8, 32, 15), large=Setting(5, 1, 6, 9))


def load_batches(detector: str, side: int, setting: Setting) -> list[dict]:
    """The first test images at a side."""
    cfg = Config.fromfile(ROOT / DETECTORS[detector].plain)
    cfg.merge_from_dict(data_options(DATA['root'], side * setting.scale))
    dataset = build_loader(
        dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
    ).dataset
    images = [dataset[index] for index in range(setting.images)]
    return [
        pseudo_collate(images[at : at + setting.batch])
        for at in range(0, len(images), setting.batch)
    ]


def plain_tasks(detector: str, checkpoint: str, setting: Setting) -> dict[str, BenchmarkTask]:
    model = MODELS.build(Config.fromfile(ROOT / DETECTORS[detector].plain).model)
    model.load_state_dict(read_checkpoint(checkpoint)['state_dict'])
    return {
        f'plain_{name}': BenchmarkTask(model.eval(), load_batches(detector, side, setting))
        for name, (side, _) in SIZES.items()
    }


def dynamic_tasks(
    detector: str, variant: str, checkpoint: str, setting: Setting
) -> dict[str, BenchmarkTask]:
    """All images at exit 0, half of them hard, all at exit 1."""
    cfg = Config.fromfile(ROOT / DETECTORS[detector].dynamic)
    cfg.merge_from_dict(DYNAMIC[variant])
    model, _ = build_pair(cfg, checkpoint)
    batches = load_batches(detector, DATA['size'], setting)
    thresholds = dict(exit0=ALL_EASY, half=half_hard_threshold(model, batches), exit1=ALL_HARD)
    return {
        f'{variant}_{name}': BenchmarkTask(model, batches, threshold)
        for name, threshold in thresholds.items()
    }


@torch.no_grad()
def gflops_of(task: BenchmarkTask) -> float:
    if task.threshold is not None:
        task.detector.set_budget(threshold=task.threshold)
    images = sum(len(batch['inputs']) for batch in task.batches)
    flops, _ = count_flops(lambda: [task.detector.test_step(batch) for batch in task.batches])
    return flops / images / 1e9


@torch.no_grad()
def measure(detector: str, name: str, checkpoint: str) -> dict:
    """Seconds and GFLOPs per image of all detectors in a setting."""
    setting, before = SETTINGS[name], os.getloadavg()[0]
    tasks = plain_tasks(detector, checkpoint, setting)
    for variant in VARIANTS:
        tasks.update(dynamic_tasks(detector, variant, checkpoint, setting))
    seconds = time_interleaved(tasks, setting.rounds, cli.progress, f'{detector}, {name}')
    cfg = Config.fromfile(ROOT / DETECTORS[detector].plain)
    facts = dict(
        provenance(cfg, Path(checkpoint).name, range(setting.images), 'cpu'),
        **setting._asdict(),
        batch_size=setting.batch,
        load_before=before,
        load_after=os.getloadavg()[0],
    )
    return dict(
        provenance=facts,
        points={
            key: dict(quartiles(np.asarray(values) / setting.images), gflops=gflops_of(tasks[key]))
            for key, values in seconds.items()
        },
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    cli.prepare()
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    make_data()
    runs = {run.name: run for run in all_runs()}
    for detector in DETECTORS:
        pretrained = f'{detector}-pretrained-0'
        if not (WORK / pretrained / 'trained').exists():
            train(runs[pretrained])
        for name in SETTINGS:
            path = RESULTS / f'{detector}-{name}.json'
            if not path.exists():
                measured = measure(detector, name, latest_checkpoint(str(WORK / pretrained)))
                write_atomically(json.dumps(measured).encode(), path)


if __name__ == '__main__':
    cli.run(main)
