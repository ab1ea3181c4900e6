"""Make a static page that runs a detector in the browser: drop pictures, move the slider.

From a folder of `tools/export.py --standalone`. The page needs a file server and nothing else:
python -m http.server --directory OUT
"""

import argparse


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('export', help='folder of tools/export.py --standalone')
    parser.add_argument('--out', default='docs/demo', help='the folder to make: docs/demo')
    parser.add_argument(
        '--runtime',
        help='npm package of onnxruntime-web, a file or unpacked; by default npm gets it',
    )
    parser.add_argument(
        '--examples',
        help='folder of pictures to begin with; by default built-in ones, for a detector of digits',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.web.demo_page import make_demo_page


def main() -> None:
    """Make the page."""
    args = parse_args()
    cli.prepare()
    size = make_demo_page(args.export, args.out, args.runtime, args.examples)
    print(f'written to {args.out}: {size / 1e6:.1f} MB')
    print(f'look at it: python -m http.server --bind 127.0.0.1 --directory {args.out}')


if __name__ == '__main__':
    cli.run(main)
