"""Make the built-in data set `digits`: handwriting over photographs, in COCO format."""

import argparse


def parse_args():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--root', default='data/digits', help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='of every random choice')
    for split, count in dict(train=3000, val=500, test=500).items():
        parser.add_argument(f'--{split}', type=int, default=count, help=f'{split} images')
    parser.add_argument('--size', type=int, default=128, help='height and width of the images')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet.datasets.digits import make_digits


def show(done, total):
    """Print how many images are made, every hundred."""
    if done % 100 == 0 or done == total:
        print(f'\r{done} of {total} images', end='' if done < total else '\n', flush=True)


def main():
    """Make the built-in images."""
    args = parse_args()
    sizes = {split: getattr(args, split) for split in ('train', 'val', 'test')}
    try:
        print(make_digits(args.root, sizes, args.size, args.seed, progress=show))
    except (ValueError, FileExistsError, ImportError) as error:
        raise SystemExit(f'make_digits: {error}') from None


if __name__ == '__main__':
    main()
