"""Measure how AP falls where one part of a detector is pruned, and suggest what to prune for a
wanted size.

Weights of the smallest magnitude are set to zero, without training on. Results go to a JSON file as
they come: the same command goes on where it was stopped. A plot is beside it.
"""

import argparse
from pathlib import Path

from dynamicdet_options import ConfigOptions


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', metavar='CKPT', help='its checkpoint')
    parser.add_argument('--out', help='JSON file; work_dirs/NAME/sensitivity.json by default')
    parser.add_argument(
        '--block',
        action='append',
        metavar='NAME=PATTERN,...',
        help='a part, such as heads=rpn_head,roi_head; again for more. By default the parts of the '
        'detector',
    )
    parser.add_argument('--layers', action='store_true', help='each layer of these blocks, too')
    parser.add_argument(
        '--shares',
        type=float,
        nargs='+',
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        help='what is pruned, in [0, 1)',
    )
    parser.add_argument(
        '--structured', action='store_true', help='whole channels instead of single weights'
    )
    parser.add_argument(
        '--images', type=int, default=0, help='how many of the validation images: all'
    )
    parser.add_argument('--metric', choices=['AP', 'AP50'], default='AP', help='what is measured')
    parser.add_argument(
        '--size', type=float, default=0.7, help='share of the weights that may be left: 0.7'
    )
    parser.add_argument('--device', help='where to run; the best that is there')
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be measured; measure nothing'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.annotations import original_of
from dynamicdet.building import build_loader
from dynamicdet.compression.pruning_allocation import allocate_pruning
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.datasets.config_datasets import require_one_coco
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.measuring.sensitivity import (
    blocks_of,
    draw_sensitivity,
    identity_of,
    load_any_detector,
    measure_sensitivity,
    parts_of,
    sensitivity_table,
    truth_of,
)


def main() -> None:
    """Measure AP at each share of each part and write the table."""
    args = parse_args()
    args.device = args.device or get_device()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_settings(cfg, 'val_dataloader')
    cli.require_device(args.device)
    if not 0 < args.size <= 1:
        raise UsageError(f'--size is a share of the weights in (0, 1]; got {args.size}')
    out = args.out or str(Path(cfg.work_dir) / 'sensitivity.json')
    cli.require_writable(out)
    for share in args.shares:
        PruningBlock('--shares', ['*'], share)
    if args.images < 0:
        raise UsageError(f'--images must be 1 or more, or 0 for all; got {args.images}')
    dataset = require_one_coco(cfg, 'val', 'sensitivity is measured')
    cli.check_data(cfg, 'val')
    model = load_any_detector(cfg, args.checkpoint, args.device)
    blocks = {}
    for text in args.block or []:
        name, equals, patterns = text.partition('=')
        if not name or not patterns:
            raise UsageError(f"--block needs NAME=PATTERN,...; got '{text}'")
        blocks[name] = patterns.split(',')
    blocks = blocks or blocks_of(model)
    parts = parts_of(model, blocks, args.layers, args.structured, max(args.shares))
    if args.dry_run:
        print(*(f'{part.name}: {part.weights:,} weights' for part in parts), sep='\n')
        print(f'each at {", ".join(f"{share:.0%}" for share in args.shares)}; results to {out}')
        return
    loader = build_loader(dict(cfg.val_dataloader, dataset=dataset))
    truth_of(loader.dataset)
    identity = identity_of(
        args.checkpoint,
        original_of(str(loader.dataset.ann_file)),
        args.images,
        args.metric,
        args.structured,
    )
    curves = measure_sensitivity(
        model, loader, parts, args.shares, args.images, args.metric, out, identity, cli.progress
    )
    print(*sensitivity_table(curves), sep='\n')
    # Of layers where they were measured: a block is what they add up to.
    chosen = curves[len(blocks) :] if args.layers else curves
    allocation = allocate_pruning(chosen, args.size)
    print(
        f'for {allocation.left:.1%} of these weights, at a predicted loss of {allocation.loss:.2f} '
        f'{args.metric} (at least {allocation.bound:.2f}), prune:'
    )
    print(*(f'  {name}: {share:.0%}' for name, share in allocation.shares.items()), sep='\n')
    plot = Path(out).with_suffix('.png')
    write_atomically(draw_sensitivity(curves, allocation, args.metric), plot)
    print(f'written to {out} and {plot}')


if __name__ == '__main__':
    cli.run(main)
