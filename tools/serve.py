"""Serve a detector over HTTP.

POST /detect takes a JPEG or PNG file: as the body, in a form, or in base64 in JSON. With
--target-latency the threshold follows the queue: as many pictures go on to later exits as can still
be answered in time. Other pages: /docs, /healthz, /readyz, /metrics.
"""

import argparse
from pathlib import Path

from dynamicdet_options import ConfigOptions, positive


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, or a folder that tools/export.py wrote')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file or URL, of a config')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen to: 127.0.0.1')
    parser.add_argument('--port', type=int, default=8000, help='port; 0 is any free one: 8000')
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    parser.add_argument(
        '--target-latency', type=float, help='seconds from arrival to answer to stay below'
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        '--hard-share',
        type=float,
        help='share of hard images, 0 to 1; with --target-latency the most there may be',
    )
    group.add_argument('--threshold', type=float, help='hard above this difficulty, -1 to 1')
    parser.add_argument('--batch-size', type=positive, default=8, help='most pictures of a pass: 8')
    parser.add_argument(
        '--queue', type=positive, default=256, help='most pictures that may be here: 256'
    )
    parser.add_argument(
        '--max-bytes', type=positive, default=20_000_000, help='of a request: 20,000,000'
    )
    parser.add_argument(
        '--max-pixels', type=positive, default=50_000_000, help='of a picture: 50,000,000'
    )
    parser.add_argument(
        '--timeout',
        type=float,
        default=30.0,
        help='seconds for a request to come, and for its answer: 30',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs',
    )
    args = parser.parse_args()
    if args.threshold is not None and args.target_latency is not None:
        parser.error('--target-latency sets the threshold itself: leave out --threshold')
    if not args.timeout > 0:
        parser.error('--timeout must be above 0')
    return args


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.deploy.folder import open_detector
from dynamicdet.serving.server import bind, require_server, serve


def main() -> None:
    """Serve until SIGTERM."""
    args = parse_args()
    cli.prepare()
    require_server()
    # The address first: a model takes seconds.
    bound = bind(args.host, args.port)
    from dynamicdet.serving.app import RequestLimits
    from dynamicdet.serving.batcher import Batcher

    cfg = None if Path(args.config).is_dir() else cli.load_config(args)
    detector = open_detector(cfg or args.config, args.checkpoint, args.device)
    if args.target_latency is None and (args.threshold, args.hard_share) != (None, None):
        budget = dict(threshold=args.threshold, hard_share=args.hard_share)
        detector.model.set_budget(
            {name: value for name, value in budget.items() if value is not None}
        )
    batcher = Batcher(
        detector,
        args.target_latency,
        1.0 if args.hard_share is None else args.hard_share,
        args.batch_size,
        args.queue,
    )
    first, last = batcher.costs
    print(f'a picture takes {first:.3g} s to the first exit, {last:.3g} s to the last', flush=True)
    limits = RequestLimits(args.max_bytes, args.max_pixels, args.timeout)
    serve(batcher, bound, limits, lambda text: print(text, flush=True))


if __name__ == '__main__':
    cli.run(main)
