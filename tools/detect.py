"""Detect in many pictures, into a Parquet table with a row for each.

SOURCES are pictures, folders, patterns, .txt lists, .tar shards, and URLs of these (s3://...). A
run that was killed goes on where it was when its command is given again. With --ray the work is
shared out on a Ray cluster.
"""

import argparse
import functools
import hashlib
from pathlib import Path

from dynamicdet_options import ConfigOptions, add_budget_arguments, positive


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('sources', nargs='+', help='pictures, folders, patterns, .txt, .tar, URLs')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', required=True, help='the Parquet file to make')
    parser.add_argument('--coco', metavar='FILE', help='write the results as a COCO file, too')
    parser.add_argument('--device', help='such as cpu or cuda:0; the best that is there')
    parser.add_argument('--batch-size', type=positive, default=1, help='pictures of a pass: 1')
    parser.add_argument(
        '--part-size', type=positive, default=64, help='pictures that are written together: 64'
    )
    parser.add_argument(
        '--max-pixels',
        type=positive,
        default=200_000_000,
        help='of a picture; larger ones are errors: 200,000,000',
    )
    parser.add_argument('--decoders', type=positive, default=2, help='threads that read ahead: 2')
    add_budget_arguments(parser)
    parser.add_argument('--ray', action='store_true', help='on a Ray cluster')
    parser.add_argument(
        '--ray-address', metavar='ADDRESS', help='of a cluster; a new one on this machine without'
    )
    parser.add_argument('--workers', type=positive, help='processes on the cluster: one per core')
    parser.add_argument('--gpus', type=float, default=0.0, help='of each process, such as 0.5: 0')
    parser.add_argument(
        '--pools', type=int, choices=[1, 2], default=2, help='1: each process does all passes: 2'
    )
    parser.add_argument(
        '--handover',
        choices=['auto', 'maps', 'picture'],
        default='auto',
        help='what later passes start from; auto measures what is cheaper',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs',
    )
    args = parser.parse_args()
    if args.ray_address and not args.ray:
        parser.error('--ray-address is for --ray')
    return args


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.config import Config

from dynamicdet import cli
from dynamicdet.bulk.one_process import detect_all
from dynamicdet.bulk.passes import Passes, build_passes
from dynamicdet.bulk.pools import detect_in_pools, make_plan, start
from dynamicdet.bulk.sources import list_pictures
from dynamicdet.bulk.table import ResultTable, require_arrow, write_coco
from dynamicdet.errors import import_optional
from dynamicdet.progress import picture_bar


def builder(args: argparse.Namespace, cfg: Config) -> functools.partial:
    """Makes the detector of a process, at the speed that is asked for."""
    return functools.partial(
        build_passes,
        cfg,
        args.checkpoint,
        args.device,
        cli.budget_from(args),
        args.batch_size,
        args.max_pixels,
    )


def settings_of(args: argparse.Namespace, cfg: Config, passes: Passes) -> dict:
    """What results hang on."""
    content = Path(args.checkpoint).read_bytes() if Path(args.checkpoint).is_file() else b''
    return dict(
        checkpoint=args.checkpoint,
        checkpoint_sha256=hashlib.sha256(content).hexdigest(),
        config_sha256=hashlib.sha256(repr(cfg.to_dict()).encode()).hexdigest(),
        threshold=passes.model.threshold.reshape(-1).tolist(),
        batch_size=args.batch_size,
        max_pixels=args.max_pixels,
        classes=list((passes.model.dataset_meta or {}).get('classes', ())),
    )


def hard_share(passes: Passes) -> float:
    """The share of hard pictures that the calibration expects; without one, half."""
    known = passes.model.difficulties
    if not len(known):
        return 0.5
    return float((known > passes.model.threshold.reshape(-1)[0]).float().mean())


def run_on_cluster(args: argparse.Namespace, cfg: Config, passes: Passes, table: ResultTable, tell):
    """Share the work out."""
    ray = start(args.ray_address, args.workers)
    workers = args.workers or int(ray.cluster_resources().get('CPU', 1))
    plan = make_plan(ray, passes, table, workers, hard_share(passes), args.pools, args.handover)
    print(plan.why, flush=True)
    detect_in_pools(ray, builder(args, cfg), table, plan, tell, args.gpus)
    ray.shutdown()


def main() -> None:
    """Detect in all pictures."""
    args = parse_args()
    cli.prepare()
    require_arrow()
    for path in filter(None, (args.out, args.coco)):
        cli.require_writable(path)
    if args.ray:
        import_optional('ray', 'clusters', 'ray')
    cfg = cli.load_config(args)
    if args.device:
        cli.require_device(args.device)
    pictures = list_pictures(args.sources)
    passes = builder(args, cfg)()
    settings = settings_of(args, cfg, passes)
    with ResultTable(args.out, pictures, settings, args.part_size) as table:
        if table.complete:
            print(f'{args.out} is complete already')
        else:
            left = sum(len(table.part(number)) for number in table.missing())
            with picture_bar(len(pictures), len(pictures) - left) as bar:
                if args.ray:
                    run_on_cluster(args, cfg, passes, table, bar.update)
                else:
                    detect_all(passes, table, bar.update, args.decoders)
            counts = table.finish()
            print(f'{counts["pictures"]} pictures, {counts["errors"]} with an error: {args.out}')
    if args.coco:
        write_coco(args.coco, args.out, settings['classes'])


if __name__ == '__main__':
    cli.run(main)
