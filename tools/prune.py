"""Remove channels of a trained detector for good.

Writes DIR/NAME.pth, with what is left of the checkpoint, and DIR/NAME.py, a config that builds such
a detector: both are used like any other, for testing and for training on. The config has no
pretrained weights and starts from the checkpoint.
"""

import argparse
from pathlib import Path

from dynamicdet_options import ConfigOptions


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', metavar='CKPT', help='its checkpoint')
    parser.add_argument('--out', metavar='DIR', required=True, help='folder to write to')
    parser.add_argument('--name', help="name of both files; the config's with _pruned by default")
    parser.add_argument(
        '--block',
        action='append',
        metavar='PATTERN,...=SHARE',
        help='take this share of channels, in [0, 1), from the modules that match; again for more '
        'blocks. '
        "'*=0.3' by default",
    )
    parser.add_argument(
        '--exclude',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='modules that stay as they are, of all blocks',
    )
    parser.add_argument(
        '--over',
        choices=['layer', 'block'],
        default='layer',
        help='the same share of each layer (default), or the weakest channels of a whole block',
    )
    parser.add_argument(
        '--norm', type=float, default=2, help='the n of the Ln norm that ranks channels: 2'
    )
    parser.add_argument(
        '--random', action='store_true', help='take channels at random, not by their norm'
    )
    parser.add_argument(
        '--round-to', type=int, default=16, help='channels left are multiples of this: 16'
    )
    parser.add_argument('--seed', type=int, default=0, help='of --random')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='for GFLOPs; the size at which papers state them',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be removed; write nothing'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.building import load_detector
from dynamicdet.deploy.pruned_config import (
    describe_pruning,
    parse_blocks,
    prune_detector,
    write_pruned,
)


def main() -> None:
    """Remove channels and write the smaller detector."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    blocks = parse_blocks(args.block or ['*=0.3'], args.exclude, args.over, args.norm, args.random)
    if not args.dry_run:
        cli.make_folder(args.out)
    model, checkpoint = load_detector(cfg, args.checkpoint, plain=True)
    made = prune_detector(cfg, model, blocks, args.round_to, args.seed)
    print(*describe_pruning(cfg, made, args.shape), sep='\n')
    name = args.name or f'{Path(args.config).stem}_pruned'
    if args.dry_run:
        print(f'would write {name}.py and {name}.pth to {args.out}')
    else:
        print(
            'written to '
            + ' and '.join(write_pruned(made, checkpoint, args.checkpoint, args.out, name))
        )


if __name__ == '__main__':
    cli.run(main)
