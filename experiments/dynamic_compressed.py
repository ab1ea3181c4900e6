"""The experiment on dynamic and compressed together, experiments/compression.md: prune, export, quantize,
measure.

It goes step by step, several at a time, and each step leaves a small file in
experiments/results/dynamic_compressed: stop it when you like and start it again. Steps that have
one are not done again; remove the file to do so. The detectors are those of the experiment on
routing, trained first where their weights are not in work_dirs/routing. Latencies come last, by
`--clock`, on a machine that does nothing else.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from dynamic_compressed_measure import CONFIG, FORMS, SIDES, WEIGHTS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from routing import WORK as ROUTING
from routing import make_data
from routing import train as train_run
from routing_runs import DATA, DETECTORS, HELD_OUT, PRETRAINING, SEEDS, all_runs, data_options
from steps import ROOT, do_all, make_parser, reading, run, wait_for

from dynamicdet import cli
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.files import latest_checkpoint, write_atomically
from dynamicdet.testing import randomize
from mmdet.registry import MODELS

WORK = ROOT / 'work_dirs' / 'dynamic_compressed'
RESULTS = ROOT / 'experiments' / 'results' / 'dynamic_compressed'
MEASURE = 'experiments/dynamic_compressed_measure.py'
#: What is made of a detector: a router for it as it is; one for it with fewer channels, tuned; and,
#: to tell what tuning alone does, one for it with all channels, tuned alike.
KINDS = ('whole', 'pruned', 'tuned')
#: Those that become graphs, and are timed.
DEPLOYED = KINDS[:2]
#: Share of channels that goes, from every layer; what is left is a multiple of 8, as layers are
#: this narrow.
SHARE, ROUND_TO = 0.35, 8
#: A detector of the size that users have, with random weights: for latencies alone, on these many
#: test images, in these many rounds. Its layers are not tried in 8 bits one by one.
FULL, FULL_SIDE, FULL_TIMES = dict(faster_rcnn_r50='configs/dy_faster_rcnn.py'), 640, (2, 7)
UNTRIED = ('--noise=inf', '--calibrate-images=8')
#: As the detector was tuned itself, but on all images. A validation in the middle of a run tells
#: nothing that the test set does not.
TUNING = (
    f'train_dataloader.dataset.indices={PRETRAINING}',
    'val_dataloader=None',
    'val_evaluator=None',
    'val_cfg=None',
)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, 'steps')
    parser.add_argument(
        '--clock', action='store_true', help='measure latencies, when all else is done'
    )
    return parser.parse_args()


def start_of(detector: str) -> Path:
    """The folder of the run whose weights are taken."""
    return ROUTING / f'{detector}-depth_resolution-{SEEDS[0]}'


def once(made: Path, *command: object, log: Path) -> None:
    """Run a tool, unless what it makes is there: tools write that whole or not at all."""
    if not made.exists():
        run(*map(str, command), log=log)


def train_start(detector: str) -> None:
    """The detector as the experiment on routing trains it, and what that starts from."""
    runs = {run.name: run for run in all_runs()}
    start = runs[start_of(detector).name]
    for training in (runs[start.start], start):
        train_run(training)


def prepare_whole(detector: str, folder: Path, name: str = CONFIG) -> Path:
    """The detector as it is, but with an untrained router that sees means alone, as those that
    experiments/compression.md judges: one of three statistics has nine times the weights, and they stay
    float. Its config goes into the folder.

    Returns:
        Path: Its checkpoint.
    """
    start, cascade = start_of(detector), folder / 'cascade.pth'
    with reading:
        cfg = Config.fromfile(start / 'config.py')
    cfg.model.router = dict(type='Router')
    cfg.dump(folder / name)
    checkpoint = read_checkpoint(latest_checkpoint(str(start)))
    init_default_scope('mmdet')
    fresh = MODELS.build(cfg.model).state_dict()
    state = {
        key: fresh[key] if key.startswith('router.') else value
        for key, value in checkpoint['state_dict'].items()
    }
    meta = {
        key: checkpoint['meta'][key]
        for key in ('dataset_meta',)
        if key in checkpoint.get('meta', {})
    }
    write_checkpoint(dict(state_dict=state, meta=meta), str(cascade))
    return cascade


def prepare_pruned(detector: str, folder: Path) -> Path:
    """The detector with fewer channels, tuned."""
    log = folder / 'tools.log'
    cascade = prepare_whole(detector, folder, 'whole.py')
    once(
        folder / CONFIG,
        'tools/prune.py',
        folder / 'whole.py',
        cascade,
        f'--out={folder}',
        f'--name={Path(CONFIG).stem}',
        f'--block=*={SHARE}',
        f'--round-to={ROUND_TO}',
        '--shape',
        128,
        128,
        log=log,
    )
    return tune(folder)


def prepare_tuned(detector: str, folder: Path) -> Path:
    """The detector with all its channels, tuned alike."""
    cascade = prepare_whole(detector, folder)
    return tune(folder, f'load_from={cascade}')


def tune(folder: Path, *options: str) -> Path:
    """Tune a folder's detector, or go on with it; its checkpoint."""
    done = folder / 'tuning' / 'trained'
    if not done.exists():
        run(
            'tools/train.py',
            str(folder / CONFIG),
            '--no-data-check',
            '--resume',
            f'--work-dir={done.parent}',
            '--cfg-options',
            *TUNING,
            *options,
            log=folder / 'train.log',
        )
        done.touch()
    return Path(latest_checkpoint(str(done.parent)))


def prepare_full(name: str) -> list[Path]:
    """Folders of a full-size detector, whole and pruned, with its graphs."""
    folders = [WORK / f'{name}-{kind}' for kind in DEPLOYED]
    whole, pruned = folders
    whole.mkdir(parents=True, exist_ok=True)
    with reading:
        cfg = Config.fromfile(ROOT / FULL[name])
        digits = Config.fromfile(ROOT / DETECTORS['faster_rcnn'].dynamic)
    digits.merge_from_dict(data_options(DATA['root'], FULL_SIDE))
    for key in ('val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator'):
        cfg[key] = digits[key]
    cfg.dump(whole / CONFIG)
    init_default_scope('mmdet')
    if not (whole / WEIGHTS).exists():
        model = randomize(MODELS.build(cfg.model), SEEDS[0])
        write_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(whole / WEIGHTS))
    once(
        pruned / CONFIG,
        'tools/prune.py',
        whole / CONFIG,
        whole / WEIGHTS,
        f'--out={pruned}',
        f'--name={Path(CONFIG).stem}',
        f'--block=*={SHARE}',
        '--shape',
        320,
        320,
        log=WORK / 'full.log',
    )
    if not (pruned / WEIGHTS).exists():
        os.link(pruned / f'{Path(CONFIG).stem}.pth', pruned / WEIGHTS)
    for folder in folders:
        export(folder, ('float32', 'int8'), UNTRIED)
    return folders


PREPARE = dict(zip(KINDS, (prepare_whole, prepare_pruned, prepare_tuned)))


def route(cascade: Path, folder: Path) -> None:
    """Fit a router to images that the cascade did not see, and calibrate it."""
    config, record, router = folder / CONFIG, folder / 'held_out.npz', folder / 'router.pth'
    log = folder / 'tools.log'
    once(
        record,
        'tools/record.py',
        config,
        cascade,
        f'--out={record}',
        '--split=train',
        '--view=none',
        '--no-data-check',
        '--cfg-options',
        f'train_dataloader.dataset.indices=-{HELD_OUT}',
        log=log,
    )
    once(
        router,
        'tools/fit_router.py',
        config,
        cascade,
        '--no-data-check',
        f'--records={record}',
        '--objective=rank',
        f'--seed={SEEDS[0]}',
        f'--out={router}',
        log=log,
    )
    once(
        folder / WEIGHTS,
        'tools/calibrate.py',
        config,
        router,
        '--no-data-check',
        '--hard-share=0.5',
        '--device=cpu',
        f'--out={folder / WEIGHTS}',
        log=log,
    )


def export(folder: Path, forms: Sequence[str] = tuple(FORMS), more: Sequence[str] = ()) -> None:
    """The graphs, in float32 and in 8 bits."""
    for form in forms:
        if FORMS[form] is not None:
            once(
                folder / form,
                'tools/export.py',
                folder / CONFIG,
                folder / WEIGHTS,
                *FORMS[form],
                *more,
                f'--out={folder / form}',
                log=folder / 'export.log',
            )


def do(name: str) -> None:
    """All of one step."""
    detector, kind = name.split('-')
    if kind == 'start':
        train_start(detector)
        return
    wait_for(f'{detector}-start')
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    route(PREPARE[kind](detector, folder), folder)
    if kind in DEPLOYED:
        export(folder)
    measured = folder / 'points.json'
    run(MEASURE, 'ap', str(measured), str(folder), log=folder / 'measure.log')
    write_atomically(measured.read_bytes(), RESULTS / f'{name}.json')


def is_done(name: str) -> bool:
    return (RESULTS / f'{name}.json').exists()


def to_do(only: list[str]) -> list[str]:
    """Steps that were asked for and have no result; first the trainings that they start from, where
    the weights are gone."""
    waiting = [f'{detector}-{kind}' for kind in KINDS for detector in DETECTORS]
    waiting = [name for name in waiting if any(part in name for part in only) and not is_done(name)]
    starts = [
        f'{detector}-start'
        for detector in DETECTORS
        if any(name.startswith(detector) for name in waiting)
        and not (start_of(detector) / 'trained').exists()
    ]
    return starts + waiting


def by_the_clock(only: list[str]) -> None:
    """Latencies of all variants of a detector, in one process; one detector and size after the
    other."""
    for detector, side in itertools.product(DETECTORS, SIDES):
        name, folders = (
            f'{detector}-clock_{side}',
            [WORK / f'{detector}-{kind}' for kind in DEPLOYED],
        )
        if is_done(name) or not any(part in name for part in only):
            continue
        for folder in folders:
            if not is_done(folder.name) or not all(
                (folder / form).exists() for form in ('float32', 'int8')
            ):
                raise UsageError(
                    f'{folder} lacks detectors to time: run this without --clock first; if '
                    f'{RESULTS / folder.name}.json is there, remove it before'
                )
        take_time(name, side, SIDES[side], folders)
    for full in FULL:
        name = f'{full}-clock_{FULL_SIDE}'
        if not is_done(name) and any(part in name for part in only):
            take_time(name, FULL_SIDE, FULL_TIMES, prepare_full(full))


def take_time(name: str, side: int, times: Sequence[int], folders: Sequence[Path]) -> None:
    measured = WORK / f'{name}.json'
    run(
        MEASURE,
        'clock',
        str(measured),
        str(side),
        *map(str, (*times, *folders)),
        log=WORK / f'{name}.log',
    )
    write_atomically(measured.read_bytes(), RESULTS / f'{name}.json')
    print(f'{name} done', flush=True)


def main() -> None:
    args = parse_args()
    waiting = to_do(args.only)
    print(f'{len(waiting)} steps to do: ' + ', '.join(waiting), flush=True)
    if args.list:
        return
    if args.clock:
        by_the_clock(args.only)
    elif waiting:
        make_data()
        do_all(waiting, do, args.jobs)


if __name__ == '__main__':
    cli.run(main)
