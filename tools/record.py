"""Run every image of a data set through every exit of a dynamic detector, once, and keep what comes
out: detections, difficulties, losses, the router's features, GFLOPs and latencies, in one file.

tools/analyze_routing.py says from it what the router is worth; routers are trained on it in
seconds.
"""

import argparse

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', help='checkpoint file of step 2, or of step 1 to train routers on'
    )
    add_common_arguments(parser)
    parser.add_argument('--out', default='record.npz', help='file to write: record.npz')
    parser.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        default='test',
        help="data: test by default; train takes the training images under the test's pipeline",
    )
    parser.add_argument('--device', help='device whose latencies count; the best that is there')
    parser.add_argument(
        '--view',
        choices=['flip', 'shift', 'none'],
        default='flip',
        help='how each image is seen a second time, for the honest oracle: flipped by default; '
        'shifted, for what has no mirror image, such as digits; or none, in about two thirds of '
        'the time',
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.building import load_dynamic_detector, require_dynamic
from dynamicdet.measuring.recording import build_record_loader, record_data_set, require_recordable
from dynamicdet.models.weights import exits_digest
from dynamicdet.routing.record import write_record


def main() -> None:
    """Record both exits on a data set."""
    args = parse_args()
    args.device = args.device or get_device()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_device(args.device)
    cli.require_writable(args.out)
    require_dynamic(cfg)
    require_recordable(cfg, args.split)
    cli.check_settings(cfg, args.split)
    model, checkpoint = load_dynamic_detector(cfg, args.checkpoint, args.device, any_router=True)
    digest = exits_digest(checkpoint['state_dict'])
    cli.check_data(cfg, args.split, files=not args.no_data_check)
    loader = build_record_loader(cfg, args.split)
    record = record_data_set(
        model, cfg, loader, cli.progress, view=args.view, checkpoint=args.checkpoint
    )
    record.provenance['exits_digest'] = digest
    write_record(record, args.out)
    print(f'{len(record)} images, {record.exits} exits: {args.out}')


if __name__ == '__main__':
    cli.run(main)
