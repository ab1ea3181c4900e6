"""All experiments on real pictures, experiments/real.md, one after the other.

    python experiments/real.py DATA work_dirs/real [--more FOLDER] [--large FOLDER]

DATA is a folder with ``coco/``, ``animals/``, ``drones/`` and ``weights/``; of what is missing, the steps are left out,
which is said. --more is a folder of further pictures of COCO val2017, --large one of large aerial pictures, see
experiments/real_large_detector.py. Every step writes its numbers as NAME.json into the folder of results, and its
output as NAME.log; a step that is done is not done again, and one that was stopped goes on. Hours on two cores; what
has times in it (front, large, drones, animals) should run on an idle machine. Seed 0.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

from steps import run

from dynamicdet import cli
from dynamicdet.errors import UsageError


class Step(NamedTuple):
    """A step: its name, the folder that it needs, and its commands, in order."""

    name: str
    needs: Path | None
    commands: list[list]


def steps_of(args: argparse.Namespace) -> list[Step]:
    """All of them, in an order in which none waits for a later one."""
    data, out = args.data, args.out
    nano = data / 'weights' / 'yolox_nano_mmdet.pth'
    records, front = out / 'coco', out / 'front'
    both = [records / 'router.npz', records / 'test.npz']
    more = [f'--more={args.more}'] if args.more else []
    coco, animals, drones = (data / name for name in ('coco', 'animals', 'drones'))
    large = ['--data', args.large, '--out', out / 'large']
    # A step's last command writes its numbers, where {} stands.
    return [
        Step('records', coco, [['real_records.py', data, records, *more]]),
        Step('image', coco, [['real_coco.py', records, nano, '--resamples=50', '--out', '{}']]),
        Step('merging', coco, [['real_merging.py', *both, '--out', '{}']]),
        Step('regions', coco, [['real_regions_simulated.py', records]]),
        Step('truth', coco, [['real_truth.py', *both]]),
        Step(
            'front',
            coco,
            [
                ['real_front.py', 'prepare', data, front, *more],
                ['real_front.py', 'measure', front],
                ['real_front.py', 'compare', front, '--json', '{}'],
            ],
        ),
        Step(
            'animals',
            animals,
            [['real_animals.py', animals, out / 'animals', '--weights', nano, '--json', '{}']],
        ),
        Step(
            'animals_exits',
            animals,
            [
                [
                    'real_animals_exits.py',
                    animals,
                    out / 'animals',
                    '--weights',
                    nano,
                    '--json',
                    '{}',
                ]
            ],
        ),
        Step(
            'drones',
            drones,
            [
                ['real_drones.py', 'train', '--data', data, '--work', out / 'drones'],
                [
                    'real_drones.py',
                    'measure',
                    '--data',
                    data,
                    '--work',
                    out / 'drones',
                    '--out',
                    '{}',
                ],
            ],
        ),
        Step(
            'large',
            args.large,
            [
                ['real_large_detector.py', '--weights', nano, *large],
                ['real_large.py', *large, '--json', '{}'],
            ],
        ),
    ]


def do(step: Step, out: Path) -> str:
    """Run a step unless it is done, and say how it went."""
    done, numbers, log = (out / f'{step.name}.{kind}' for kind in ('done', 'json', 'log'))
    if step.needs is None or not step.needs.is_dir():
        return f'left out, since there is no {step.needs or "folder --large"}'
    if done.exists():
        return f'done before: see {log}'
    begin = time.monotonic()
    for program, *arguments in step.commands:
        words = [str(numbers) if word == '{}' else str(word) for word in arguments]
        run(f'experiments/{program}', *words, log=log)
    done.touch()
    return f'{(time.monotonic() - begin) / 60:.1f} min: see {log}'


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'data', type=absolute, help='folder with coco/, animals/, drones/ and weights/'
    )
    parser.add_argument('out', type=absolute, help='folder for results')
    parser.add_argument('--more', type=absolute, help='folder with more pictures of COCO val2017')
    parser.add_argument('--large', type=absolute, help='folder of large aerial pictures')
    parser.add_argument('--only', nargs='+', help='names of steps; all')
    args = parser.parse_args()
    cli.prepare()
    steps = steps_of(args)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown or not (args.data / 'weights').is_dir():
        raise UsageError(
            f'there is no step {", ".join(sorted(unknown))}; they are '
            f'{", ".join(step.name for step in steps)}'
            if unknown
            else f"'{args.data}' has no folder weights/: see --help"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps if not args.only or step.name in args.only]
    for number, step in enumerate(chosen, 1):
        print(f'[{number}/{len(chosen)}] {step.name} ...', flush=True)
        print(f'    {do(step, args.out)}', flush=True)


def absolute(path: str) -> Path:
    """Programs run in the repository's root."""
    return Path(path).resolve()


if __name__ == '__main__':
    cli.run(main)
