"""Export a detector to ONNX Runtime or OpenVINO: a folder with a graph for each part, in float32
or in 8 bits.

Dynamic detectors stay dynamic. In 8 bits, ranges are measured on validation images that pass
through the exported detector by the config's test pipeline, layers that suffer too much stay float,
and a calibrated dynamic detector keeps its calibration: thresholds follow what 8 bits change, so
that as many images are hard as before. The latency of each exit is measured on the same images, as
this machine runs the graphs (OMP_NUM_THREADS threads): budgets in time go by it.

With --standalone the folder needs neither this project nor torch: it has one graph, or two, from a
picture to boxes, and runtime.py, which runs them; in float32, in 8 bits or, with --float16, in
float16.
"""

import argparse
import copy
import sys
from pathlib import Path

from dynamicdet_options import ConfigOptions


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', required=True, help='the folder to make')
    parser.add_argument('--int8', action='store_true', help='integers of 8 bits; float32 without')
    parser.add_argument(
        '--standalone',
        action='store_true',
        help='whole graphs with runtime.py, which needs onnxruntime and numpy alone',
    )
    parser.add_argument(
        '--float16',
        action='store_true',
        help='with --standalone: layers in float16, half the size; decoding and NMS stay float32',
    )
    parser.add_argument(
        '--one-file',
        action='store_true',
        help='with --standalone: one graph, in which what hard images need stands in an If',
    )
    parser.add_argument(
        '--calibrate-images',
        type=int,
        default=200,
        metavar='N',
        help='validation images to measure on: 200',
    )
    parser.add_argument(
        '--ranges',
        choices=['mse', 'minmax'],
        default='mse',
        help='a range of all that was seen (minmax), or of what has the least error: mse',
    )
    parser.add_argument(
        '--noise',
        type=float,
        default=0.01,
        help="error of a part's outputs to get down to by leaving layers float, as a share of "
        'their power: 0.01',
    )
    parser.add_argument(
        '--float-share',
        type=float,
        default=0.1,
        help='of the multiply-adds, what may stay float: 0.1',
    )
    parser.add_argument(
        '--reduce-range',
        choices=['auto', 'yes', 'no'],
        default='auto',
        help='weights of 7 bits, for x86 processors without VNNI; auto asks this machine',
    )
    parser.add_argument(
        '--float-between',
        action='store_true',
        help='sums, joins, pooling and SiLU between layers stay float: slower, and a little closer '
        'to float32',
    )
    parser.add_argument(
        '--compress',
        action='store_true',
        help='graphs by zstd: smaller files, as fast once they are loaded',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be exported; write nothing'
    )
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from mmengine.config import Config
from torch.utils.data import DataLoader

from dynamicdet import cli
from dynamicdet.building import build_loader, load_detector
from dynamicdet.deploy.deployment import deploy, graph_parts
from dynamicdet.deploy.folder import require_new
from dynamicdet.deploy.graphs import exportable_parts, need_for_deployment
from dynamicdet.deploy.latencies import describe_latencies
from dynamicdet.deploy.standalone import export_standalone, read_delivery
from dynamicdet.deploy.standalone_graphs import build_halves
from dynamicdet.errors import UsageError


def check(args: argparse.Namespace) -> None:
    """Raise a `UsageError` for options that do not fit, before the model is built."""
    for name in ('onnx', 'onnxruntime', *('zstandard',) * args.compress):
        need_for_deployment(name)
    require_new(args.out)
    if not args.dry_run:
        cli.make_folder(str(Path(args.out).absolute().parent))
    if args.calibrate_images < 1:
        raise UsageError(
            f'--calibrate-images must be 1 or more, not {args.calibrate_images}: int8 needs images '
            'to calibrate on'
        )
    if args.standalone and args.compress:
        raise UsageError(
            '--standalone writes no zstd: leave out --compress, or leave out --standalone'
        )
    if (args.float16 or args.one_file) and not args.standalone:
        raise UsageError('--float16 and --one-file are of --standalone: add it')
    if args.float16 and args.int8:
        raise UsageError('give --int8 or --float16, not both')
    if not 0 <= args.noise or not 0 <= args.float_share <= 1:
        raise UsageError('--noise must not be negative, and --float-share be in [0, 1]')


def build_val_loader(cfg: Config) -> DataLoader:
    """Over the config's validation images, one by one: what all layers of an image give is kept
    until its ranges are known."""
    cli.require_settings(cfg, 'val_dataloader')
    cli.check_data(cfg, 'val')
    settings = copy.deepcopy(cfg.val_dataloader)
    settings.update(num_workers=0, persistent_workers=False, batch_size=1)
    with cli.silence():
        return build_loader(settings)


def warn_unmeasured(so: str, fault: str) -> None:
    """Say why a folder has no latencies."""
    print(f'warning: latencies are not measured, and the folder {so}: {fault}', file=sys.stderr)


def describe_int8(about: dict) -> None:
    """Say what 8 bits cost each part."""
    for name, layers in about.get('layers', {}).items():
        print(
            f'{name}: noise {layers["noise_all_int8"]:.2g} of the signal in 8 bits; '
            f'{len(layers["float_layers"])} layers float ({layers["float_share"]:.1%} of the '
            f'multiply-adds), noise {layers["noise"]:.2g}'
        )
    if about.get('reduced_range'):
        print(
            'weights have 7 bits, since x86 processors without VNNI add products in 16 bits; '
            'export on the machine that counts, or with --reduce-range no'
        )


def validation_loader(cfg: Config, needed: bool) -> tuple[DataLoader | None, str | None]:
    """A loader over validation images, or None and what is missing; that is raised if it is
    needed."""
    try:
        return build_val_loader(cfg), None
    except UsageError as error:
        if needed:
            raise
        return None, str(error)


def export_alone(args: argparse.Namespace, cfg: Config) -> None:
    """Export a detector that needs nothing of this project."""
    if args.dry_run:
        read_delivery(cfg)
        model = load_detector(cfg, args.checkpoint)[0]
        halves = build_halves(model)
        names = ', '.join(f'{name}.onnx' for name in (['detector'] if args.one_file else halves))
        kind = 'int8' if args.int8 else 'float16' if args.float16 else 'float32'
        print(f'would write {args.out}, standalone, {kind}: {names}')
        return
    loader, fault = validation_loader(cfg, args.int8)
    graphed = None
    if args.int8 or args.float16:
        # What cannot be exported is refused before it is calibrated.
        read_delivery(cfg)
        build_halves(load_detector(cfg, args.checkpoint)[0])
        graphed = graph_parts(
            cfg,
            args.checkpoint,
            loader,
            cli.progress,
            args.calibrate_images,
            args.ranges,
            args.noise,
            args.float_share,
            dict(yes=True, no=False).get(args.reduce_range),
            not args.float_between,
            args.float16,
        )
        describe_int8(graphed.about)
    about = export_standalone(
        cfg,
        args.checkpoint,
        args.out,
        None if loader is None else loader.dataset,
        cli.progress,
        graphed,
        args.one_file,
    )
    if fault:
        warn_unmeasured('does not say what an exit costs', fault)
    else:
        print(describe_latencies(dict(about['timing'], seconds=about['seconds'])))
    print(f'written to {args.out}: {about["bytes"] / 1e6:.2f} MB')


def main() -> None:
    """Export a detector as a deployment folder."""
    args = parse_args()
    cli.prepare()
    check(args)
    cfg = cli.load_config(args)
    if args.standalone:
        export_alone(args, cfg)
        return
    if args.dry_run:
        parts = exportable_parts(load_detector(cfg, args.checkpoint)[0])
        kind = 'int8' if args.int8 else 'float32'
        print(f'would write {args.out}, {kind}: {", ".join(part.name for part in parts)}')
        return
    loader, fault = validation_loader(cfg, args.int8)
    about = deploy(
        cfg,
        args.checkpoint,
        args.out,
        loader if args.int8 else None,
        cli.progress,
        args.calibrate_images,
        args.ranges,
        args.noise,
        args.float_share,
        dict(yes=True, no=False).get(args.reduce_range),
        args.compress,
        not args.float_between,
        None if loader is None else loader.dataset,
    )
    if fault:
        warn_unmeasured('takes no budget in time', fault)
    describe_int8(about)
    if about['latencies']:
        print(describe_latencies(about['latencies']))
    print(f'written to {args.out}: {about["bytes"] / 1e6:.2f} MB')


if __name__ == '__main__':
    cli.run(main)
