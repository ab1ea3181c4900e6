"""Measure what being dynamic costs: exit 0 against the stock detector, a mixed batch against
uniform ones, and the speed of both exits.

Detectors take turns in one process, on the same weights and pictures in memory. Where exit 0 sees a
smaller image (model.first_scale), the stock detector gets the same one. Run it on a machine that
does nothing else.
"""
import argparse
import json
import os
from pathlib import Path

import torch
from mmengine.device import get_device

from dynamicdet.apis import cli
from dynamicdet.apis.benchmark import BATCH_SIZE, WANTED, build_pair, make_batch, measure
from dynamicdet.apis.calibration import provenance
from dynamicdet.datasets.digits import MIN_IMAGE_SIZE
from dynamicdet.engine import write_atomically
from dynamicdet.errors import UsageError

CONFIG = Path(__file__).parents[1] / 'configs' / 'dy_faster_rcnn.py'
TIMED = dict(
    stock=('stock detector', 1),
    exit0=('exit 0', 1),
    exit1=('exit 1', 1),
    all_easy=('all easy', BATCH_SIZE),
    half_hard=('half hard', BATCH_SIZE),
    all_hard=('all hard', BATCH_SIZE))
RATIOS = dict(
    exit0_to_stock='exit 0 / stock detector',
    mixed_to_mean='half hard / mean of all easy and all hard')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', default=str(CONFIG), help='config: dy_faster_rcnn.py')
    parser.add_argument(
        '--checkpoint', help="its checkpoint, or the plain detector's; random weights without")
    parser.add_argument(
        '--size', nargs=2, type=int, default=[800, 1333], metavar=('H', 'W'),
        help="height and width of the pictures: 800 1333, mmdet's for COCO")
    parser.add_argument('--rounds', type=int, default=30, help='timed rounds at batch 1: 30')
    parser.add_argument(
        '--batch-rounds', type=int, default=6, help=f'timed rounds at batch {BATCH_SIZE}: 6')
    parser.add_argument('--device', default=get_device(), help='such as cpu or cuda:0')
    parser.add_argument('--threads', type=int, help='CPU threads of torch; its own choice without')
    parser.add_argument('--seed', type=int, default=0, help='of random weights and pictures: 0')
    parser.add_argument(
        '--out', default='work_dirs/benchmark.json',
        help='where figures go: work_dirs/benchmark.json')
    parser.set_defaults(cfg_options=None)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    if min(args.rounds, args.batch_rounds) < 1 or (args.threads or 1) < 1:
        raise UsageError('--rounds, --batch-rounds and --threads must be 1 or more')
    if min(args.size) < MIN_IMAGE_SIZE:
        raise UsageError(f'--size must be {MIN_IMAGE_SIZE} {MIN_IMAGE_SIZE} or more')
    cli.require_device(args.device)
    cli.require_writable(args.out)


def table(found: dict) -> str:
    """The figures as plain text."""
    lines = [f'{"":<42}{"batch":>6}{"ms":>10}{"quartiles":>20}{"images/s":>10}']
    for key, (name, size) in TIMED.items():
        low, median, high = (1e3 * found['seconds'][key][part] for part in ('q1', 'median', 'q3'))
        spread = f'{low:.1f} to {high:.1f}'
        lines.append(
            f'{name:<42}{size:>6}{median:>10.1f}{spread:>20}{1e3 * size / median:>10.2f}')
    lines.append(f'\n{"":<42}{"":>6}{"ratio":>10}{"quartiles":>20}{"wanted":>10}')
    for key, name in RATIOS.items():
        low, median, high = (found['ratios'][key][part] for part in ('q1', 'median', 'q3'))
        spread, wanted = f'{low:.3f} to {high:.3f}', f'<= {WANTED[key]:g}'
        lines.append(f'{name:<42}{"":>6}{median:>10.3f}{spread:>20}{wanted:>10}')
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    cli.prepare()
    check(args)
    cfg = cli.load_config(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Before the work starts: what others do to the figures.
    load = os.getloadavg()[0]
    model, stock = build_pair(cfg, args.checkpoint, args.device, args.seed)
    batch = make_batch(args.size, seed=args.seed)
    weights = args.checkpoint or 'random weights'
    machine = dict(
        provenance(cfg, weights, batch['inputs'], args.device),
        cpu=provenance(cfg, weights, batch['inputs'], 'cpu')['device'],
        load_before=load,
        seed=args.seed,
        size=args.size,
        first_scale=model.first_scale,
        rounds=args.rounds,
        batch_rounds=args.batch_rounds,
        batch_size=BATCH_SIZE)
    found = measure(model, stock, batch, args.rounds, args.batch_rounds, cli.progress)
    print(f'{args.config}, {weights}, {args.size[0]} x {args.size[1]} pixels\n'
          f'{machine["device"]}; {machine["threads"]} threads; torch {machine["torch"]}; '
          f'load before: {load:.2f}\n'
          f'{found["boxes_compared"]} boxes of exit 0 and the stock detector are equal\n')
    print(table(found))
    content = dict(machine=machine, wanted=WANTED, **found)
    write_atomically(json.dumps(content, indent=1).encode(), args.out)
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    cli.run(main)
