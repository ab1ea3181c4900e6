"""Run every image of a data set through every exit of a dynamic detector, once, and keep what comes
out: detections, difficulties, losses, the router's features, GFLOPs and latencies, in one file.

tools/analyze_routing.py says from it what the router is worth; routers are trained on it in
seconds.
"""

import argparse

from dynamicdet_options import add_common_arguments, add_record_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', help='checkpoint file of step 2, or of step 1 to train routers on'
    )
    add_common_arguments(parser)
    parser.add_argument('--out', default='record.npz', help='file to write: record.npz')
    add_record_arguments(parser, 'train', 'val', 'test')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()


from dynamicdet import cli


def main() -> None:
    """Record both exits on a data set."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_writable(args.out)
    cli.require_record(args, cfg)
    _, _, record = cli.make_record(args, cfg, args.out, any_router=True)
    print(f'{len(record)} images, {record.exits} exits: {args.out}')


if __name__ == '__main__':
    cli.run(main)
