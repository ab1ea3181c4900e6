"""What recording costs against running the exits alone: recording_cost.py CONFIG CHECKPOINT.

Milliseconds of processor time per image, the median over rounds in which all take turns; data in
memory, one thread:

* ``forced``: every image through each exit by whole forward passes;
* ``steps``: the same detections, each backbone run once;
* ``record``: what tools/record.py does with ``--view none``: detections, losses, features, entropy
  and the writing of the file; without the costs of sizes, which are measured on a few images;
* ``with view``: the same with the flipped view, which is every image once more.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.config import DictAction

from dynamicdet import cli
from dynamicdet.building import load_dynamic_detector
from dynamicdet.measuring.calibration import exit_states
from dynamicdet.measuring.latencies import force_dynamic_exit
from dynamicdet.measuring.recording import build_record_loader, record_images
from dynamicdet.models import DynamicDetector
from dynamicdet.routing.record import RoutingRecord, write_record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=5, help='after one that does not count')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args()


@torch.no_grad()
def forced(model: DynamicDetector, batches: list) -> None:
    for exit in range(model.num_exits):
        force_dynamic_exit(model, exit)
        for batch in batches:
            model.test_step(batch)


@torch.no_grad()
def steps(model: DynamicDetector, batches: list) -> None:
    force_dynamic_exit(model, 0)
    for batch in batches:
        data = model.data_preprocessor(batch, False)
        for state in exit_states(model, data['inputs'], data['data_samples']):
            model.finish(state)


def main() -> None:
    args = parse_args()
    cli.prepare()
    torch.set_num_threads(1)
    cfg = cli.load_config(args)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    # Before the loader is built, whose sampler would go on to the size of the whole set.
    cfg.test_dataloader.dataset.indices = args.images
    with cli.silence():
        model, _ = load_dynamic_detector(cfg, args.checkpoint, 'cpu', any_router=True)
        loader = build_record_loader(cfg, 'test')
    given, dataset = list(loader), loader.dataset

    def record(view: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            recorded = record_images(model, dataset, batches, lambda steps, _: steps, view)
            images = [image for batch in recorded for image in batch]
            costs = [1.0] * model.num_exits
            made = RoutingRecord.from_images(images, costs, costs)
            write_record(made, Path(folder) / 'record.npz')

    kinds = {
        'forced': lambda: forced(model, batches),
        'steps': lambda: steps(model, batches),
        'record': lambda: record('none'),
        'with view': lambda: record('flip'),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(args.rounds + 1):
        for name, run in kinds.items():
            # Anew: heads write into what they are given.
            batches = copy.deepcopy(given)
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * (turn > 0))
    ms = {
        name: 1e3 * float(np.median(seconds[1:])) / len(dataset) for name, seconds in times.items()
    }
    print(f'{args.config}, {len(dataset)} images, ms per image:')
    for name, milliseconds in ms.items():
        print(f'  {name:10} {milliseconds:8.2f}')
    for name, passes in (('record', 1), ('with view', 2)):
        against = [ms[name] / passes / ms[base] for base in ('forced', 'steps')]
        print(f'{name}: {against[0]:.2f} of forced, {against[1]:.2f} of steps')


if __name__ == '__main__':
    cli.run(main)
