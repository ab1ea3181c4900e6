"""Count parameters and GFLOPs of a Detectron2 detector, plain or dynamic: of each exit, and at any
hard share, for an image of noise. 2 x multiply-adds of convolutions and linear layers; fvcore's
counters, Detectron2's own, count multiply-adds, and norms and resizing besides.
"""

import argparse

from detectron2_options import add_shape_argument, run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='yaml config of a detector, dynamic or not')
    parser.add_argument('--checkpoint', help='its checkpoint: proposals cost; random weights')
    add_shape_argument(parser)
    parser.add_argument(
        '--hard-share',
        nargs='+',
        type=float,
        default=[0, 0.1, 0.5, 0.9, 1],
        metavar='SHARE',
        help='shares of hard images, 0 to 1: 0 0.1 0.5 0.9 1',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    from dynamicdet.errors import UsageError
    from dynamicdet_detectron2.building import load_any
    from dynamicdet_detectron2.measuring import count_costs

    if not all(0 <= share <= 1 for share in args.hard_share):
        raise UsageError('--hard-share takes shares from 0 to 1')
    _, model = load_any(args.config, args.checkpoint, args.opts)
    costs = count_costs(model, args.shape)
    print(f'{args.config}; an image of {args.shape[0]} x {args.shape[1]} pixels\n')
    print(f'{"":<16}{"parameters, M":>15}{"GFLOPs (2 x)":>15}')
    for cost in costs:
        name = f'exit {cost.exit}' if len(costs) > 1 else 'detector'
        print(f'{name:<16}{cost.parameters / 1e6:>15.2f}{cost.gflops:>15.2f}')
    if len(costs) > 1:
        first, last = costs[0].gflops, costs[-1].gflops
        for share in args.hard_share:
            print(f'{f"{share:.0%} hard":<16}{"":>15}{(1 - share) * first + share * last:>15.2f}')


if __name__ == '__main__':
    run(main, parse_args())
