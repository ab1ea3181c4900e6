"""Count parameters and GFLOPs of a detector: of its parts, of both exits, and at any hard share.

With --zoo instead of a config: count all shipped detectors and write docs/model_zoo.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', help='config file of a detector, dynamic or not')
    add_common_arguments(parser)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help="height and width; else the config's test size where that is square, and 800 1280",
    )
    parser.add_argument(
        '--hard-share',
        nargs='+',
        type=float,
        default=[0, 0.1, 0.5, 0.9, 1],
        metavar='SHARE',
        help='shares of hard images, 0 to 1: 0 0.1 0.5 0.9 1',
    )
    parser.add_argument('--fused', action='store_true', help='fuse it first, as for inference')
    parser.add_argument('--zoo', action='store_true', help='write docs/model_zoo.md')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.errors import UsageError
from dynamicdet.files import write_atomically
from dynamicdet.measuring.flops import (
    Costs,
    build_detector,
    count_parameters,
    measure_costs,
    stated_shape,
)
from dynamicdet.measuring.model_zoo import count_row, make_model_zoo_page, read_models
from dynamicdet.models import can_fuse, fuse
from dynamicdet.video import EarlyExitDetector
from dynamicdet.video.costs import as_table, layer_costs, layer_seconds

ROOT = Path(__file__).parents[1]
NOTES = """mmdet, Swin and CBNetV2 state multiply-adds, at 800 x 1280; papers about YOLO twice that.
As torch counts: norms, activations, resizing and mmcv's own operators (RoIAlign; of deformable
attention and convolution what is no linear layer or convolution) are 0."""
CANNOT_FUSE = (
    'Not fused: this detector has only norms to fuse, and those count as 0 here in any case.'
)


def table(costs: Costs, shares: Sequence[float]) -> str:
    """The figures as plain text: parts, exits, mixes of the exits."""
    rows = [
        (name, f'{part.parameters / 1e6:.2f}', part.flops) for name, part in costs.parts.items()
    ]
    if len(costs.exits) > 1:
        rows += [
            (f'exit {number}', f'{exit.parameters / 1e6:.2f}', exit.flops)
            for number, exit in enumerate(costs.exits)
        ]
        rows += [(f'{100 * share:.4g}% hard', '', costs.at(share)) for share in shares]
    lines = [f'{"":<30}{"parameters, M":>15}{"G multiply-adds":>18}{"GFLOPs (2 x)":>15}']
    lines += [
        f'{name:<30}{parameters:>15}{flops / 2e9:>18.2f}{flops / 1e9:>15.2f}'
        for name, parameters, flops in rows
    ]
    return '\n'.join(lines)


def rois(costs: Costs) -> str:
    """What the heads of a two-stage detector had to do."""
    given = ' and '.join(f'{count} {kind}' for kind, count in costs.rois.items())
    return (
        f'The heads of an exit were given {given}, from random weights and noise; mmdet states '
        '1000 boxes and 100 masks.'
    )


def write_zoo() -> None:
    """Count all models of the metafiles and write docs/model_zoo.md."""
    entries = read_models(ROOT).values()
    page = ROOT / 'docs' / 'model_zoo.md'
    rows = [count_row(ROOT, entry) for entry in cli.progress(entries, 'detectors')]
    write_atomically(make_model_zoo_page(rows).encode(), page)
    print(f'{len(rows)} detectors: {page}')


def count_one(args: argparse.Namespace) -> None:
    """Print what one config costs at each exit and hard share."""
    if not all(0 <= share <= 1 for share in args.hard_share):
        raise UsageError('--hard-share takes shares from 0 to 1')
    cfg = cli.load_config(args)
    shape = args.shape or stated_shape(cfg)
    model = build_detector(cfg)
    fused = args.fused and can_fuse(model)
    if fused:
        fuse(model)
    costs = measure_costs(model, shape)
    if isinstance(model, EarlyExitDetector):
        print(f'{args.config}{", fused" * fused}, an image of {shape[0]} x {shape[1]} pixels\n')
        print(as_table(model, layer_seconds(model, layer_costs(model, shape), shape), shape))
        return
    print(
        f'{args.config}{", fused" * fused}: {count_parameters(model) / 1e6:.2f} M parameters; '
        f'costs for an image of {shape[0]} x {shape[1]} pixels\n'
    )
    print(table(costs, args.hard_share))
    print(f'\n{NOTES}')
    if costs.rois:
        print(rois(costs))
    if args.fused and not fused:
        print(CANNOT_FUSE)


def main() -> None:
    """Print the cost of a config, or write the page of all."""
    args = parse_args()
    cli.prepare()
    if args.zoo == bool(args.config):
        raise UsageError('name a config, or ask for --zoo')
    if args.zoo:
        write_zoo()
    else:
        count_one(args)


if __name__ == '__main__':
    cli.run(main)
