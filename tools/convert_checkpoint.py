"""Convert a checkpoint from elsewhere to one of this project or of MMDetection.

Every entry of the file must be known and every entry of the config's model filled, or nothing is
written. Nothing in the file is executed.
"""

import argparse
from pathlib import Path

from dynamicdet_options import ConfigOptions


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='SRC', help='a torch file, or a .pkl of numpy arrays')
    parser.add_argument(
        '--from',
        dest='family',
        required=True,
        choices=['dynamicdet', 'yolov7', 'yolov5', 'cbnetv2', 'detectron2'],
        help='where it comes from',
    )
    parser.add_argument(
        '--config', required=True, help='of the detector to fill; mmdet::PATH is one of MMDetection'
    )
    parser.add_argument('--out', required=True, help='checkpoint to write')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs, such as the number of classes',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

import torch
from mmengine.registry import init_default_scope

from dynamicdet import cli
from dynamicdet.building import build_model
from dynamicdet.checkpoints import write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.interop import convert_checkpoint


def main() -> None:
    """Convert a checkpoint and write it."""
    args = parse_args()
    cli.prepare()
    cfg = cli.load_config(args)
    if (
        Path(args.out).exists()
        and Path(args.source).exists()
        and Path(args.out).samefile(args.source)
    ):
        raise UsageError(f"--out would overwrite '{args.source}'")
    init_default_scope('mmdet')
    torch.manual_seed(cfg.get('randomness', {}).get('seed') or 0)
    checkpoint, lines = convert_checkpoint(args.source, args.family, build_model(cfg))
    cli.require_writable(args.out)
    write_checkpoint(checkpoint, args.out)
    print(*lines, f'written to {args.out}', sep='\n')


if __name__ == '__main__':
    cli.run(main)
