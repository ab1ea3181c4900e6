"""Convert a trained dynamic detector between Detectron2 and MMDetection, either way.

Faster, Mask and Cascade R-CNN with ResNet and FPN. Needs neither of the two. Lossless: the way back
gives the same numbers. Nothing in the file is executed. The config on the other side must describe
the same detector: docs/detectron2_more.md says what to look at.
"""

import argparse

from detectron2_options import run


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='SRC', help='checkpoint of a dynamic detector')
    parser.add_argument('--to', required=True, choices=['detectron2', 'mmdet'], help='whose names')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Convert, and write."""
    from pathlib import Path

    from dynamicdet.errors import UsageError
    from dynamicdet.exchange.detectron2 import convert_checkpoint
    from dynamicdet.exchange.reading import read_content
    from dynamicdet.exchange.writing import write_checkpoint

    if Path(args.out).exists() and Path(args.out).samefile(args.source):
        raise UsageError(f"--out would overwrite '{args.source}'")
    try:
        converted = convert_checkpoint(read_content(args.source), args.to)
    except UsageError as error:
        raise UsageError(f"'{args.source}': {error}") from None
    write_checkpoint(converted, args.out)
    entries = converted['model' if args.to == 'detectron2' else 'state_dict']
    print(f'{len(entries)} entries converted; written to {args.out}')


if __name__ == '__main__':
    run(main, parse_args())
