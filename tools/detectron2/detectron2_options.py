"""What the command lines of Detectron2's tools share."""

import argparse
import sys
from collections.abc import Callable


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """``--step``."""
    parser.add_argument(
        '--step',
        choices=['cascade', 'router'],
        default='cascade',
        help='what to train: the cascade of both exits (step 1), or then the router (step 2), from '
        "step 1's last checkpoint in OUTPUT_DIR, or from MODEL.WEIGHTS if given; into "
        'OUTPUT_DIR/router',
    )


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """``--threshold``, ``--hard-share``, ``--target-latency``, ``--target-gflops``."""
    group = parser.add_argument_group(
        'wanted speed', 'one of these; all but the first need a calibrated checkpoint'
    )
    group.add_argument('--threshold', type=float, help='difficulty above which images are hard')
    group.add_argument('--hard-share', type=float, help='share of the images that are hard')
    group.add_argument('--target-latency', type=float, help='mean seconds per image')
    group.add_argument('--target-gflops', type=float, help='mean GFLOPs per image')


def budget_of(args: argparse.Namespace) -> dict[str, float | None]:
    """What `add_budget_arguments` read."""
    names = ('threshold', 'hard_share', 'target_latency', 'target_gflops')
    return {name: getattr(args, name) for name in names}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``CONFIG CHECKPOINT [OPTION VALUE ...]``."""
    parser.add_argument('config', help='yaml config of a dynamic detector')
    parser.add_argument('checkpoint', help='checkpoint of step 2')
    _add_opts(parser)


def _add_opts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--opts',
        nargs='+',
        default=[],
        metavar='OPTION VALUE',
        help="settings that override the config's, as Detectron2's tools take them",
    )


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dataset``, ``--losses``."""
    parser.add_argument('--dataset', help='test data, by name: the first of DATASETS.TEST')
    parser.add_argument(
        '--losses',
        action='store_true',
        help="record each exit's losses, too, which takes three times as long: for the diagnosis",
    )


def add_analysis_arguments(parser: argparse.ArgumentParser) -> None:
    """``--bootstrap``, ``--baseline``."""
    parser.add_argument('--bootstrap', type=int, default=200, help='resamples for intervals: 200')
    parser.add_argument(
        '--baseline',
        nargs='+',
        action='append',
        metavar=('CONFIG', 'CHECKPOINT'),
        help='a plain detector to compare with on the same images; may be given several times',
    )


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """``--shape``, and ``--opts``."""
    parser.add_argument(
        '--shape',
        nargs=2,
        type=_pixels,
        default=[800, 1280],
        metavar=('H', 'W'),
        help='height and width: 800 1280',
    )
    _add_opts(parser)


def _pixels(word: str) -> int:
    if not word.isdigit() or int(word) < 32:
        raise argparse.ArgumentTypeError(f'sides are whole numbers from 32 on, not {word}')
    return int(word)


def run(main: Callable, args: argparse.Namespace) -> None:
    """Run a tool, in as many processes as asked for. What its user got wrong is one line on stderr
    and status 2, not a trace."""
    from dynamicdet.errors import UsageError

    try:
        if getattr(args, 'num_gpus', 1) * getattr(args, 'num_machines', 1) == 1:
            main(args)
        else:
            from dynamicdet_detectron2.launching import launch

            launch(
                main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,)
            )
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
