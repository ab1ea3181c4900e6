"""Make the built-in data set `digits-video`: handwriting moving over photographs, in CocoVID
format."""

import argparse


def parse_args():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--root', default='data/digits_video', help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='of every random choice')
    for split, count in dict(train=120, val=20, test=40).items():
        parser.add_argument(f'--{split}', type=int, default=count, help=f'{split} videos')
    parser.add_argument('--length', type=int, default=60, help='frames per video')
    parser.add_argument('--size', type=int, default=128, help='height and width of the frames')
    parser.add_argument(
        '--no-mp4', action='store_true', help='leave out the H.264 files, which need PyAV'
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet.video.digits_video import make_digits_video


def show(done, total):
    """Print how many videos are made."""
    print(f'\r{done} of {total} videos', end='' if done < total else '\n', flush=True)


def main():
    """Make the built-in videos."""
    args = parse_args()
    sizes = {split: getattr(args, split) for split in ('train', 'val', 'test')}
    try:
        print(
            make_digits_video(
                args.root, sizes, args.length, args.size, args.seed, not args.no_mp4, progress=show
            )
        )
    except (ValueError, FileExistsError, ImportError) as error:
        raise SystemExit(f'make_digits_video: {error}') from None


if __name__ == '__main__':
    main()
