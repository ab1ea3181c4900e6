"""The experiment on early exit in video, experiments/video.md: train, record, compare gates, and run
them by the clock.

It goes step by step, several at a time, and each step leaves a small file in
experiments/results/video: stop it when you like and start it again. Steps that have one are not
done again; remove the file to do so. But what starts from weights that have to be trained again is
done again, too: runs are compared with each other. Detectors whose gates are compared come last and
alone, since what they are compared by is time.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from routing import make_data
from routing_runs import DATA, PRETRAINING, data_options
from steps import ROOT, do_all, reading, run, train_once, wait_for
from video_results import clock_results, gate_results, head_results

from dynamicdet import cli
from dynamicdet.files import latest_checkpoint, write_atomically
from dynamicdet.video.record import read_video_record

WORK = ROOT / 'work_dirs' / 'video'
RESULTS = ROOT / 'experiments' / 'results' / 'video'


class Run(NamedTuple):
    """A training: its config below configs/video, the run whose weights it starts from, and
    options."""

    config: str
    start: str | None = None
    options: Mapping[str, object] = {}


#: The weights that all start from, as users start from published ones: two epochs on the pictures
#: of the experiment on routing.
STILLS = {
    **data_options(DATA['root'], DATA['size']),
    'train_dataloader.dataset.indices': PRETRAINING,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 1,
    'param_scheduler.1.T_max': 2,
}
SHORT = {'train_dataloader.sampler.frames': 4}
#: What others start from first, and not right before them: a run that waits for its start keeps a
#: core idle.
RUNS: dict[str, Run] = dict(
    stills=Run('yolov5_digits', options=STILLS),
    plain=Run('yolov5_digits_video', 'stills'),
    joint=Run('early_exit_yolov5_digits', 'stills'),
    heads=Run('early_exit_yolov5_digits_heads', 'plain'),
    propagation=Run('early_exit_yolov5_digits_propagation', 'joint'),
    heads_distilled=Run('early_exit_yolov5_digits_heads_distilled', 'plain'),
    # On clips of no more frames than gradients pass through.
    propagation_short=Run('early_exit_yolov5_digits_propagation', 'joint', SHORT),
    distilled=Run('early_exit_yolov5_digits_distilled', 'stills'),
    gumbel=Run('early_exit_yolov5_digits_gumbel', 'stills'),
    all=Run('early_exit_yolov5_digits_all', 'propagation'),
)
#: Runs without early exits.
DETECTORS = ('stills', 'plain')
#: Whose gates are compared, and run by the clock.
GATED = ('joint', 'gumbel')
#: Those of a run that are run by the clock, if not all: others are timed with the first run.
TIMED = dict(gumbel=('temporal', "the config's"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--only', nargs='+', default=list(RUNS), choices=list(RUNS), help='these runs'
    )
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, of one thread each')
    parser.add_argument(
        '--no-clock', action='store_true', help='compare gates, but do not run them by the clock'
    )
    parser.add_argument('--list', action='store_true', help='say what there is to do, and stop')
    return parser.parse_args()


def write_config(name: str) -> Path:
    """A run's config, whole."""
    with reading:
        cfg = Config.fromfile(ROOT / 'configs' / 'video' / f'{RUNS[name].config}.py')
    cfg.merge_from_dict(dict(RUNS[name].options))
    cfg.load_from = RUNS[name].start and latest_checkpoint(str(WORK / RUNS[name].start))
    path = WORK / name / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    return path


def train(name: str) -> str:
    """Train a run, or go on with it; its last checkpoint."""
    return train_once(WORK / name, lambda: write_config(name))


def record(name: str, split: str, checkpoint: str) -> dict:
    """All exits on all frames of a split."""
    path = WORK / name / f'{split}.npz'
    if not path.exists():
        run(
            'tools/record_video.py',
            str(WORK / name / 'config.py'),
            checkpoint,
            f'--split={split}',
            f'--out={path}',
            '--no-data-check',
            log=path.with_name('record.log'),
        )
    return read_video_record(path)


def do(name: str) -> None:
    """Train; then measure, but for what is timed."""
    wait_for(RUNS[name].start)
    checkpoint = train(name)
    if name not in DETECTORS and name not in GATED:
        write(name, head_results(record(name, 'test', checkpoint)))


def do_gates(name: str, by_the_clock: bool) -> None:
    """Of a trained run: its exits, its gates, and perhaps both by the clock."""
    cfg, checkpoint = str(WORK / name / 'config.py'), latest_checkpoint(str(WORK / name))
    test, val = (record(name, split, checkpoint) for split in ('test', 'val'))
    if not is_done(name):
        write(name, {**head_results(test), **gate_results(test, val, cfg, checkpoint)})
    if not by_the_clock:
        return
    numbers = json.loads((RESULTS / f'{name}.json').read_text())
    numbers['gates'] = {
        gate: result
        for gate, result in numbers['gates'].items()
        if gate in TIMED.get(name, numbers['gates'])
    }
    write(f'{name}_clock', clock_results(cfg, checkpoint, numbers, val, os.cpu_count()))
    print(f'{name} by the clock', flush=True)


def write(name: str, numbers: dict) -> None:
    write_atomically(
        json.dumps(dict(run=name, **numbers), default=str).encode(), RESULTS / f'{name}.json'
    )


def is_done(name: str) -> bool:
    return (RESULTS / f'{name}.json').exists()


def to_do(names: Sequence[str]) -> list[str]:
    """Runs without results; what they start from, where its weights are gone; and all that starts
    from that."""
    waiting = {
        name
        for name in names
        if name not in DETECTORS
        and not (is_done(name) and (name not in GATED or is_done(f'{name}_clock')))
    }
    # Backwards, so that a start's own start is looked at after it.
    gone = set()
    for name in reversed(RUNS):
        start = RUNS[name].start
        if name in waiting | gone and start and not (WORK / start / 'trained').exists():
            gone.add(start)
    for name in RUNS:
        if name in gone or RUNS[name].start in gone:
            gone.add(name)
    return [name for name in RUNS if name in waiting | gone]


def forget(names: Sequence[str]) -> None:
    """Results of weights that are gone."""
    for name in names:
        if not (WORK / name / 'trained').exists():
            for path in (RESULTS / f'{name}.json', RESULTS / f'{name}_clock.json'):
                path.unlink(missing_ok=True)


def main() -> None:
    args = parse_args()
    # As the runs: more threads than cores make everything slow.
    torch.set_num_threads(1)
    waiting = to_do(args.only)
    timed = [name for name in GATED if name in waiting]
    print(f'to do: {", ".join(waiting)}; by the clock: {", ".join(timed)}', flush=True)
    if args.list:
        return
    make_data()
    run('tools/make_digits_video.py', log=WORK / 'data.log')
    forget(waiting)
    # In this order, so what a run starts from is done, or being done, before it is reached.
    do_all(waiting, do, args.jobs)
    for name in timed:
        do_gates(name, not args.no_clock)


if __name__ == '__main__':
    cli.run(main)
