"""The experiment on routing, docs/benchmarks.md: train, record, fit routers, sum up.

Hours on two cores, so it goes step by step, several at a time, and each step leaves a file: stop it when
you like and start it again. What a run came to is a small file in docs/results/routing; runs that have
one are not trained again. Remove the file to do so.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, List

import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from routing_results import dynamic_results, plain_results
from routing_runs import DATA, HELD_OUT, Run, all_runs

from dynamicdet.apis import cli
from dynamicdet.engine import latest_checkpoint
from dynamicdet.engine.atomic_backend import write_atomically
from dynamicdet.routing.record import read_record

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / 'work_dirs' / 'routing'
RESULTS = ROOT / 'docs' / 'results' / 'routing'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', default=[''], help='runs whose names contain one of these')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, of one thread each')
    parser.add_argument('--list', action='store_true', help='say what there is to do, and stop')
    return parser.parse_args()


def run(*command: str, log: Path) -> None:
    """Run a tool in the repository's root, its output into a file; end with it if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode
    if code:
        raise RuntimeError(f'{command[0]} failed with status {code}: see the end of {log}')


def make_data() -> None:
    sizes = [f'--{split}={DATA[split]}' for split in ('train', 'val', 'test')]
    run('tools/make_digits.py', f"--root={DATA['root']}", f"--size={DATA['size']}", *sizes,
        log=WORK / 'data.log')


def train(one: Run) -> str:
    """Train a run, or go on with it; its last checkpoint."""
    folder = WORK / one.name
    if not (folder / 'trained').exists():
        config = write_config(one)
        run('tools/train.py', str(config), '--no-data-check', '--resume', f'--work-dir={folder}',
            log=folder / 'train.log')
        (folder / 'trained').touch()
    return latest_checkpoint(str(folder))


def write_config(one: Run) -> Path:
    """A run's config, whole; the other tools read it too."""
    with reading:
        cfg = Config.fromfile(ROOT / one.config)
    cfg.merge_from_dict(one.options)
    if one.start:
        cfg.load_from = latest_checkpoint(str(WORK / one.start))
    path = WORK / one.name / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    return path


def record(one: Run, checkpoint: str) -> None:
    """The records that a run's numbers are made of: the test set; for dynamic detectors also images to fit
    routers to, held out and trained on."""
    folder = WORK / one.name
    parts = dict(test=('test', []))
    if one.is_dynamic:
        indices = '--cfg-options train_dataloader.dataset.indices='
        parts.update(held_out=('train', f'--view=none {indices}-{HELD_OUT}'.split()),
                     train=('train', f'--view=none {indices}{HELD_OUT}'.split()))
    for name, (split, more) in parts.items():
        path = folder / f'{name}.npz'
        if path.exists():
            continue
        if one.is_dynamic:
            # Shifted, not flipped: a digit's mirror image is none.
            view = ['--view=shift'] if split == 'test' else []
            run('tools/record.py', str(folder / 'config.py'), checkpoint, f'--out={path}', f'--split={split}',
                '--no-data-check', *view, *more, log=folder / 'record.log')
        else:
            run('tools/experiments/routing_plain.py', str(folder / 'config.py'), checkpoint, str(path),
                log=folder / 'record.log')


def sum_up(one: Run) -> dict:
    """The numbers of a run."""
    folder = WORK / one.name
    records = {path.stem: read_record(path) for path in folder.glob('*.npz')}
    with cli.silence():
        test, train = (COCO(ROOT / DATA['root'] / f'annotations/instances_{split}.json')
                       for split in ('test', 'train'))
    if not one.is_dynamic:
        return plain_results(records['test'], test)
    sources = {'held out': records['held_out'], 'trained on': records['train']}
    return dynamic_results(records['test'], test, sources, train, one.seed)


def do(one: Run) -> str:
    """All of one run."""
    start = time.monotonic()
    if one.start:
        started[one.start].result()
    checkpoint = train(one)
    record(one, checkpoint)
    numbers = dict(run=one.name, config=one.config, options={k: v for k, v in one.options.items()
                                                             if 'ann_file' not in k and 'data_root' not in k},
                   **sum_up(one))
    write_atomically(json.dumps(numbers, default=str).encode(), RESULTS / f'{one.name}.json')
    return f'{one.name}: {(time.monotonic() - start) / 60:.1f} min'


#: mmengine reads a config as a module of a fixed name: one at a time.
reading = threading.Lock()
#: Name -> the future of each run of this call, so that a run can wait for what it starts from.
started: Dict[str, Future] = {}


def main() -> None:
    args = parse_args()
    # As the runs: more threads than cores make everything slow.
    torch.set_num_threads(1)
    runs: List[Run] = [one for one in all_runs() if any(part in one.name for part in args.only)]
    waiting = [one for one in runs if not (RESULTS / f'{one.name}.json').exists()]
    names = {one.name for one in waiting}
    # The weights that others start from may be gone, also where their numbers are there.
    waiting = [one for one in all_runs() if one.name in names or one.name in {w.start for w in waiting}]
    print(f'{len(runs)} runs, {len(waiting)} to do: ' + ', '.join(one.name for one in waiting), flush=True)
    if args.list or not waiting:
        return
    make_data()
    start = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        # In this order, so what a run starts from is done, or being done, before it is reached.
        for one in waiting:
            started[one.name] = pool.submit(do, one)
        for done, future in enumerate(as_completed(started.values()), 1):
            left = (time.monotonic() - start) / done * (len(waiting) - done)
            print(f'[{done}/{len(waiting)}] {future.result()}, {left / 60:.0f} min left', flush=True)


if __name__ == '__main__':
    cli.run(main)
