"""The experiment on compression, experiments/compression.md: prune, share, quantize, fine-tune, measure.

It goes step by step, several at a time, and each step leaves a small file in
experiments/results/compression: stop it when you like and start it again. Steps that have one are
not done again; remove the file to do so. The detector is that of the experiment on routing, trained
first where its weights are not in work_dirs/routing.
"""

# Not named compression.py: Python 3.14 has a module of that name, which libraries look for on any.
from pathlib import Path

from compression_runs import START, TUNING, Step, all_steps
from mmengine.config import Config
from routing import WORK as ROUTING
from routing import make_data
from routing import train as train_run
from routing_runs import all_runs
from steps import ROOT, do_all, make_parser, reading, run, train_once, wait_for

from dynamicdet import cli
from dynamicdet.files import latest_checkpoint, write_atomically

WORK = ROOT / 'work_dirs' / 'compression'
RESULTS = ROOT / 'experiments' / 'results' / 'compression'


def prepare_start() -> None:
    """The data, and the detector that all steps take."""
    make_data()
    if not (ROUTING / START / 'trained').exists():
        runs = {run.name: run for run in all_runs()}
        for run in (runs[runs[START].start], runs[START]):
            train_run(run)


def folder_of(name: str) -> Path:
    return (ROUTING if name == START else WORK) / name


def write_config(step: Step) -> Path:
    """The config of a step's fine-tuning, whole: that of the detector, with hooks."""
    path = WORK / step.name / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    with reading:
        cfg = Config.fromfile(ROUTING / START / 'config.py')
    cfg.merge_from_dict({**TUNING, 'optim_wrapper.optimizer.lr': step.lr})
    cfg.load_from = latest_checkpoint(str(folder_of(step.start)))
    cfg.custom_hooks = cfg.custom_hooks + list(step.hooks)
    cfg.dump(path)
    return path


def tune(step: Step) -> Path:
    """Fine-tune, or go on with it; the folder of the checkpoint that is measured."""
    folder = WORK / step.name
    if step.hooks is None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder_of(step.start)
    train_once(folder, lambda: write_config(step))
    return folder


def do(step: Step) -> None:
    """All of one step."""
    wait_for(step.start)
    checkpoint = latest_checkpoint(str(tune(step)))
    measured = WORK / step.name / 'points.json'
    run(
        'experiments/compression_measure.py',
        str(ROUTING / START / 'config.py'),
        checkpoint,
        step.name,
        str(measured),
        log=WORK / step.name / 'measure.log',
    )
    write_atomically(measured.read_bytes(), RESULTS / f'{step.name}.json')


def is_done(step: Step) -> bool:
    return (RESULTS / f'{step.name}.json').exists()


def to_do(only: list[str]) -> list[Step]:
    """Steps that were asked for and have no result; and what they start from, where its weights are
    gone."""
    steps = all_steps()
    waiting = [
        step for step in steps if any(part in step.name for part in only) and not is_done(step)
    ]
    needed = {step.start for step in waiting if not (folder_of(step.start) / 'trained').exists()}
    return [step for step in steps if step in waiting or step.name in needed]


def main() -> None:
    args = make_parser(__doc__, 'steps').parse_args()
    waiting = to_do(args.only)
    print(f'{len(waiting)} steps to do: ' + ', '.join(step.name for step in waiting), flush=True)
    if args.list or not waiting:
        return
    prepare_start()
    # In this order, so what a step starts from is done, or being done, before it is reached.
    by_name = {step.name: step for step in waiting}
    do_all(list(by_name), lambda name: do(by_name[name]), args.jobs)


if __name__ == '__main__':
    cli.run(main)
