"""How long tools/make_dynamic.py takes, in plain evaluations of the same pictures.

    python experiments/make_dynamic_cost.py CONFIG CHECKPOINT --data DATA --exits 320 640

An evaluation is tools/test.py of the plain detector at the largest size. Tools run one after the other, each with one
thread and its data loader's workers; seconds of the clock, and of the processor in brackets, which other work on the
machine disturbs less.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steps import ROOT

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.measuring.make_dynamic import resized, test_pipeline_of

#: Lines of the tool behind which a part begins, and what the part is called.
PARTS = {'1 of 3': 'recording', '2 of 3': 'fitting', '3 of 3': 'report'}


def timed(*command: str) -> dict[str, tuple[float, float]]:
    """Run a tool: seconds of the clock and of the processor, of all and of its parts by the clock."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'},
    )
    marks = [('start', start)]
    for line in process.stdout:
        marks += [(part, time.monotonic()) for mark, part in PARTS.items() if line.startswith(mark)]
    if process.wait():
        raise UsageError(f'{command[0]} failed: run it by itself, {" ".join(command)}')
    end, after = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    parts = {
        name: (until - since, float('nan'))
        for (name, since), (_, until) in zip(marks, [*marks[1:], ('end', end)])
        if len(marks) > 1
    }
    return {'all': (end - start, used), **parts}


def plain_config(args: argparse.Namespace, out: Path, annotations: Path, pictures: Path) -> Path:
    """The plain detector at the largest size, on the pictures that the router is fitted to."""
    cfg = cli.read_config(args.config)
    dataset = dict(
        type='CocoDataset',
        metainfo=cfg.test_dataloader.dataset.get('metainfo') or {},
        ann_file=str(annotations),
        data_prefix=dict(img=str(pictures)),
        test_mode=True,
        pipeline=resized(test_pipeline_of(cfg), max(args.exits)),
    )
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'] = dict(
            batch_size=4,
            num_workers=2,
            persistent_workers=True,
            drop_last=False,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dataset,
        )
        cfg[f'{split}_evaluator'] = dict(
            type='CocoMetric', ann_file=str(annotations), metric='bbox'
        )
    cfg.dump(out / 'plain.py')
    return out / 'plain.py'


def main() -> None:
    """Run both, and print how they compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help="the plain detector's config")
    parser.add_argument('checkpoint')
    parser.add_argument(
        '--data', required=True, help='folder of pictures, see docs/published_weights.md'
    )
    parser.add_argument('--exits', nargs='+', type=int, default=[320, 640])
    parser.add_argument('--evaluations', type=int, default=3, help='how many: 3')
    args = parser.parse_args()
    data, checkpoint = str(Path(args.data).absolute()), str(Path(args.checkpoint).absolute())
    with tempfile.TemporaryDirectory() as folder:
        out, made = Path(folder), {}
        for view in ('flip', 'none'):
            made[view] = timed(
                'tools/make_dynamic.py',
                *(args.config, checkpoint, '--data', data, '--out', str(out / f'{view}.pth')),
                *('--exits', *map(str, args.exits), '--view', view, '--device', 'cpu'),
            )
        cfg = cli.read_config(str(out / 'flip.py')).val_dataloader.dataset
        config = plain_config(args, out, Path(cfg.ann_file), Path(cfg.data_prefix.img))
        options = ['--no-data-check', '--work-dir', str(out / 'work')]
        runs = [
            timed('tools/test.py', str(config), checkpoint, *options)['all']
            for _ in range(args.evaluations)
        ]
    clock, processor = (sum(each) / len(runs) for each in zip(*runs))
    print(f'one evaluation: {clock:.1f} s ({processor:.1f} s)')
    for view, parts in made.items():
        whole = parts.pop('all')
        said = ', '.join(f'{name} {seconds:.1f} s' for name, (seconds, _) in parts.items())
        print(
            f'make_dynamic --view {view}: {whole[0]:.1f} s ({whole[1]:.1f} s), '
            f'{whole[0] / clock:.1f} ({whole[1] / processor:.1f}) evaluations: {said}'
        )


if __name__ == '__main__':
    cli.run(main)
