"""The experiment on routing, experiments/routing.md: train, record, fit routers, sum up.

Hours on two cores, so it goes step by step, several at a time, and each step leaves a file: stop it
when you like and start it again. What a run came to is a small file in experiments/results/routing;
runs that have one are not trained again. Remove the file to do so.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from routing_results import dynamic_results, plain_results, together, with_losses_of
from routing_runs import DATA, Run, all_runs
from steps import ROOT, do_all, make_parser, reading, run, train_once, wait_for

from dynamicdet import cli
from dynamicdet.files import latest_checkpoint, write_atomically
from dynamicdet.routing.record import read_record

WORK = ROOT / 'work_dirs' / 'routing'
RESULTS = ROOT / 'experiments' / 'results' / 'routing'


def make_data() -> None:
    sizes = [f'--{split}={DATA[split]}' for split in ('train', 'val', 'test')]
    run(
        'tools/make_digits.py',
        f'--root={DATA["root"]}',
        f'--size={DATA["size"]}',
        *sizes,
        log=WORK / 'data.log',
    )


def train(run: Run) -> str:
    """Train a run, or go on with it; its last checkpoint."""
    return train_once(WORK / run.name, lambda: write_config(run, 'config', {}))


def write_config(run: Run, name: str, options: Mapping[str, object]) -> Path:
    """A run's config, whole, with more options; the tools read it."""
    with reading:
        cfg = Config.fromfile(ROOT / run.config)
    cfg.merge_from_dict({**run.options, **options})
    if run.start:
        cfg.load_from = latest_checkpoint(str(WORK / run.start))
    path = WORK / run.name / f'{name}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    return path


def record(trained: Run, checkpoint: str) -> None:
    """The records that a run's numbers are made of."""
    for name, options in trained.records.items():
        path = WORK / trained.name / f'{name}.npz'
        if path.exists():
            continue
        config = write_config(trained, 'config' if name == 'test' else name, options)
        if trained.is_dynamic:
            # Shifted, not flipped: a digit's mirror image is none.
            split, view = ('test', 'shift') if name == 'test' else ('train', 'none')
            run(
                'tools/record.py',
                str(config),
                checkpoint,
                f'--out={path}',
                f'--split={split}',
                f'--view={view}',
                '--no-data-check',
                log=path.with_name('record.log'),
            )
        else:
            run(
                'experiments/routing_plain.py',
                str(config),
                checkpoint,
                str(path),
                log=path.with_name('record.log'),
            )


def sum_up(run: Run) -> dict:
    """The numbers of a run."""
    records = {name: read_record(WORK / run.name / f'{name}.npz') for name in run.records}
    if 'test' not in records:
        return {}
    with cli.silence():
        test, train = (
            COCO(ROOT / DATA['root'] / f'annotations/instances_{split}.json')
            for split in ('test', 'train')
        )
    if not run.is_dynamic:
        return plain_results(records['test'], test)
    sources = {'held out': records['held_out'], 'trained on': records['train']}
    if 'augmented' in records:
        sources['augmented'] = together(records['train'], records['augmented'])
        halves = [read_record(WORK / name / 'other_half.npz') for name in run.needs]
        sources['cross-fitted'] = with_losses_of(records['train'], halves)
    return dynamic_results(records['test'], test, sources, train, run.seed)


def do(run: Run) -> None:
    """All of one run."""
    wait_for(run.start, *run.needs)
    checkpoint = train(run)
    record(run, checkpoint)
    if is_done(
        run
    ):  # only its weights or records were gone: its numbers are those of the ones before
        return
    options = {k: v for k, v in run.options.items() if 'ann_file' not in k and 'data_root' not in k}
    numbers = dict(run=run.name, config=run.config, options=options, **sum_up(run))
    write_atomically(json.dumps(numbers, default=str).encode(), RESULTS / f'{run.name}.json')


def is_done(run: Run) -> bool:
    return (RESULTS / f'{run.name}.json').exists()


def main() -> None:
    args = make_parser(__doc__, 'runs').parse_args()
    # As the runs: more threads than cores make everything slow.
    torch.set_num_threads(1)
    runs: list[Run] = [run for run in all_runs() if any(part in run.name for part in args.only)]
    waiting = [run for run in runs if not is_done(run)]
    names = {run.name for run in waiting}
    # The weights that others start from may be gone, also where their numbers are there.
    needed = {name for run in waiting for name in (run.start, *run.needs)}
    waiting = [run for run in all_runs() if run.name in names | needed]
    print(
        f'{len(runs)} runs, {len(waiting)} to do: ' + ', '.join(run.name for run in waiting),
        flush=True,
    )
    if args.list or not waiting:
        return
    make_data()
    # In this order, so what a run starts from is done, or being done, before it is reached.
    by_name = {run.name: run for run in waiting}
    do_all(list(by_name), lambda name: do(by_name[name]), args.jobs)


if __name__ == '__main__':
    cli.run(main)
