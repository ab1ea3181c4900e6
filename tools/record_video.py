"""Run every frame of videos through every exit of an early-exit detector, once, and keep what comes
out: detections, pooled features, changes, GFLOPs and latencies, in one file.

tools/calibrate_video.py chooses thresholds from it, and fits gates to it; tools/analyze_gates.py
compares gates.
"""

import argparse

from dynamicdet_options import add_common_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of an EarlyExitDetector')
    parser.add_argument('checkpoint', help='its checkpoint file')
    add_common_arguments(parser)
    parser.add_argument('--out', default='videos.npz', help='file to write: videos.npz')
    parser.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        default='test',
        help="data: test by default; train takes the training frames under the test's pipeline",
    )
    parser.add_argument('--device', help='device whose latencies count; the best that is there')
    parser.add_argument('--frames', type=int, default=20, help='how many frames are timed: 20')
    parser.add_argument('--rounds', type=int, default=3, help='how often each is, at each exit: 3')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.device import get_device

from dynamicdet import cli
from dynamicdet.cascade.weights import exits_digest
from dynamicdet.errors import UsageError
from dynamicdet.measuring.recording import build_record_loader, require_recordable
from dynamicdet.video.record import write_video_record
from dynamicdet.video.recording import load_early_exit_detector, record_videos


def main() -> None:
    """Record all exits on videos."""
    args = parse_args()
    args.device = args.device or get_device()
    cli.prepare()
    cfg = cli.load_config(args)
    cli.require_device(args.device)
    cli.require_writable(args.out)
    if args.frames < 1 or args.rounds < 1:
        raise UsageError('--frames and --rounds must be 1 or more')
    require_recordable(cfg, args.split)
    cli.check_settings(cfg, args.split)
    model, checkpoint = load_early_exit_detector(cfg, args.checkpoint, args.device)
    digest = exits_digest(checkpoint['state_dict'])
    cli.check_data(cfg, args.split, files=not args.no_data_check)
    loader = build_record_loader(cfg, args.split)
    record = record_videos(
        model, cfg, loader, cli.progress, args.checkpoint, args.frames, args.rounds
    )
    record['provenance']['exits_digest'] = digest
    write_video_record(record, args.out)
    videos = len({image['video'] for image in record['images']})
    print(
        f'{len(record["images"])} frames of {videos} videos, {len(record["gflops"])} exits: '
        f'{args.out}'
    )


if __name__ == '__main__':
    cli.run(main)
