"""Measure what being dynamic costs in Detectron2: exit 0 against the stock detector on what exit 0
sees, batches of which half is hard against the mean of all easy and all hard ones.

All take turns in one process, on the same weights and images of noise in memory. Run it on a
machine that does nothing else.
"""

import argparse
import json

from detectron2_options import add_shape_argument, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='yaml config of a dynamic detector')
    parser.add_argument('--checkpoint', help='its checkpoint; random weights without')
    add_shape_argument(parser)
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds: 10')
    parser.add_argument('--out', help='JSON file for the figures')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Time, and print."""
    import torch

    from dynamicdet.errors import UsageError
    from dynamicdet.files import write_atomically
    from dynamicdet.progress import progress
    from dynamicdet.timing import machine_of
    from dynamicdet_detectron2.building import load_any
    from dynamicdet_detectron2.measuring import measure_overheads, stock_of

    if args.rounds < 1:
        raise UsageError('--rounds must be 1 or more')
    torch.manual_seed(0)
    cfg, model = load_any(args.config, args.checkpoint, args.opts, dynamic=True)
    seconds = measure_overheads(model, stock_of(cfg, model), args.shape, args.rounds, progress)
    ratios = {
        'exit 0 / stock detector': seconds['exit0'] / seconds['stock'],
        'half hard / mean of all easy and all hard': 2
        * seconds['half hard']
        / (seconds['all easy'] + seconds['all hard']),
    }
    machine = machine_of(model.device)
    print(f'{args.config}; {machine["device"]}, {machine["threads"]} threads; {args.shape} pixels')
    for name, value in seconds.items():
        images = 8 if ' ' in name else 1
        print(f'{name:<44}{1e3 * value / images:>10.2f} ms per image, batch {images}')
    for name, value in ratios.items():
        print(f'{name:<44}{value:>10.3f}')
    if args.out:
        content = dict(machine=machine, shape=args.shape, seconds=seconds, ratios=ratios)
        write_atomically(json.dumps(content, indent=1).encode(), args.out)


if __name__ == '__main__':
    run(main, parse_args())
