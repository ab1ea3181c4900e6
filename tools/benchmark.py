"""Measure what being dynamic costs: exit 0 against the stock detector, mixed batches and streams
against uniform batches, and the speed of both exits; under several settings of the machine.

Detectors take turns in one process, on the same weights and pictures in memory. Where exit 0 sees a
smaller image (model.first_scale), the stock detector gets the same one. Run it on a machine that
does nothing else.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

CONFIG = Path(__file__).parents[1] / 'configs' / 'dy_faster_rcnn.py'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', default=str(CONFIG), help='config: dy_faster_rcnn.py')
    parser.add_argument(
        '--checkpoint', help="its checkpoint, or the plain detector's; random weights without"
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=[800, 1333],
        metavar=('H', 'W'),
        help="height and width of the pictures: 800 1333, mmdet's for COCO",
    )
    parser.add_argument('--rounds', type=int, default=30, help='timed rounds at batch 1: 30')
    parser.add_argument(
        '--batch-rounds', type=int, default=6, help='timed rounds of all batches of 8: 6'
    )
    parser.add_argument('--batches', type=int, default=2, help='how many batches: 2')
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    parser.add_argument(
        '--threads', nargs='+', type=int, help='CPU threads of torch; its own choice without'
    )
    parser.add_argument(
        '--dtype',
        nargs='+',
        choices=['float32', 'bfloat16', 'float16'],
        default=['float32'],
        help='data types, all but float32 by autocast: float32',
    )
    parser.add_argument(
        '--memory-format',
        nargs='+',
        choices=['contiguous', 'channels_last'],
        default=['contiguous'],
        help='of images and weights: contiguous',
    )
    parser.add_argument('--seed', type=int, default=0, help='of random weights and pictures: 0')
    parser.add_argument(
        '--out',
        default='work_dirs/benchmark.json',
        help='where figures go: work_dirs/benchmark.json',
    )
    parser.set_defaults(cfg_options=None)
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import torch
from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.datasets.digits import MIN_IMAGE_SIZE
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.measuring.benchmark import (
    BATCH_SIZE,
    WANTED,
    MachineSetting,
    build_pair,
    make_batch,
    measure_benchmark,
)
from dynamicdet.measuring.calibration import provenance

#: What was timed on all batches; on one image it was the stock detector and each exit.
WHOLE = dict(
    all_easy='all easy',
    half_hard='half hard',
    online='half hard, online budget',
    stream='half hard, stream collects hard',
    stream_all='half hard, stream collects both',
    all_hard='all hard',
)
RATIOS = dict(
    exit0_to_stock='exit 0 / stock detector',
    mixed_to_mean='half hard / mean of all easy and all hard',
    stream_to_mean='stream, collects hard / the same mean',
    stream_all_to_mean='stream, collects both / the same mean',
)


def check(args: argparse.Namespace) -> None:
    """Raise a `UsageError` for options that do not fit."""
    if min(args.rounds, args.batch_rounds, args.batches, *(args.threads or [1])) < 1:
        raise UsageError('--rounds, --batch-rounds, --batches and --threads must be 1 or more')
    if args.seed < 0:
        raise UsageError('--seed must be 0 or more')
    if min(args.size) < MIN_IMAGE_SIZE:
        raise UsageError(f'--size must be {MIN_IMAGE_SIZE} {MIN_IMAGE_SIZE} or more')
    cli.require_device(args.device)
    cli.require_writable(args.out)


def table(run: dict, batches: int) -> str:
    """The figures under one setting as plain text."""
    title = f'{run["threads"]} threads, {run["dtype"]}, {run["memory_format"]}'
    if 'refused' in run:
        return f'{title}: cannot be, {run["refused"]}'
    lines = [f'{title:<42}{"batch":>6}{"ms/image":>10}{"quartiles":>20}{"images/s":>10}']
    single = {key: key.replace('exit', 'exit ') for key in run['seconds'] if key.startswith('exit')}
    for key, name in dict(stock='stock detector', **single, **WHOLE).items():
        whole = key in WHOLE
        images = batches * BATCH_SIZE if whole else 1
        low, median, high = (
            1e3 * run['seconds'][key][part] / images for part in ('q1', 'median', 'q3')
        )
        spread = f'{low:.1f} to {high:.1f}'
        size = BATCH_SIZE if whole else 1
        lines.append(f'{name:<42}{size:>6}{median:>10.1f}{spread:>20}{1e3 / median:>10.2f}')
    lines.append(f'\n{"":<42}{"":>6}{"ratio":>10}{"quartiles":>20}{"wanted":>10}')
    for key, name in RATIOS.items():
        low, median, high = (run['ratios'][key][part] for part in ('q1', 'median', 'q3'))
        spread, wanted = f'{low:.3f} to {high:.3f}', f'<= {WANTED[key]:g}' if key in WANTED else ''
        lines.append(f'{name:<42}{"":>6}{median:>10.3f}{spread:>20}{wanted:>10}')
    return '\n'.join(lines)


def main() -> None:
    """Time a detector at each exit and write the rows."""
    args = parse_args()
    args.device = args.device or get_device()
    cli.prepare()
    check(args)
    cfg = cli.load_config(args)
    threads = args.threads or [torch.get_num_threads()]
    torch.set_num_threads(threads[0])
    ways = [
        MachineSetting(*way) for way in itertools.product(threads, args.dtype, args.memory_format)
    ]
    # Before the work starts: what others do to the figures.
    load = os.getloadavg()[0]
    model, _ = build_pair(cfg, args.checkpoint, args.device, args.seed)
    images = make_batch(args.size, args.batches * BATCH_SIZE, args.seed)
    batches = [
        {key: values[at : at + BATCH_SIZE] for key, values in images.items()}
        for at in range(0, args.batches * BATCH_SIZE, BATCH_SIZE)
    ]
    weights = args.checkpoint or 'random weights'
    machine = dict(
        provenance(cfg, weights, images['inputs'], args.device),
        cpu=provenance(cfg, weights, images['inputs'], 'cpu')['device'],
        threads=threads[0] if len(threads) == 1 else threads,
        load_before=load,
        seed=args.seed,
        size=args.size,
        first_scale=model.first_scale,
        rounds=args.rounds,
        batch_rounds=args.batch_rounds,
        batches=args.batches,
        batch_size=BATCH_SIZE,
    )
    runs = measure_benchmark(
        model, cfg.model, batches, args.rounds, args.batch_rounds, cli.progress, ways
    )
    print(
        f'{args.config}, {weights}, {args.size[0]} x {args.size[1]} pixels\n'
        f'{machine["device"]}; torch {machine["torch"]}; load before: {load:.2f}'
    )
    for run in runs:
        print(f'\n{table(run, args.batches)}')
        if 'refused' not in run:
            print(f'{run["boxes_compared"]} boxes of exit 0 and the stock detector are equal')
    content = dict(machine=machine, wanted=WANTED, runs=runs)
    write_atomically(json.dumps(content, indent=1).encode(), args.out)
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    cli.run(main)
