"""Options that the command line tools share.

A module beside the package, which takes seconds to import: a tool reads its command line first.
What only the value of an option needs is imported where there is one.
"""

import argparse
import ast
import contextlib
from typing import Any

#: Last names of keys whose value is a path: text as it stands, whatever is in it.
PATHS = (
    'ann_file',
    'cascade',
    'checkpoint',
    'data_root',
    'folder',
    'img',
    'img_path',
    'load_from',
    'outfile_prefix',
    'proposal_file',
    'seg',
    'sub_data_root',
    'work_dir',
)


class ConfigOptions(argparse.Action):
    """mmengine's `DictAction`; but paths and single values are taken as they are, quoted elements
    of a list are text, and mistakes are said."""

    @staticmethod
    def _parse_iterable(value: str) -> Any:
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            # ["0", "a, b"]. A single one in parentheses stays a list for mmengine.
            listed = (
                ast.literal_eval(value.strip()) if value.strip()[:1] in tuple('[(\'"') else None
            )
            if isinstance(listed, (list, tuple)):
                return list(listed) if value.strip()[0] in '\'"' else listed
        from dynamicdet.private_mmengine import parse_iterable, parse_scalar

        value = value.strip('\'"')
        if ',' in value or value.startswith(('(', '[')):
            return parse_iterable(value)
        return parse_scalar(value)

    @classmethod
    def _parse(cls, key: str, value: str) -> Any:
        if key.rpartition('.')[2] not in PATHS or value.startswith('[') and value.endswith(']'):
            return cls._parse_iterable(value)
        return None if value == 'None' else value.strip('\'"')

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add ``KEY=VALUE`` pairs to those of earlier uses of the option."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            key, equals, value = pair.partition('=')
            if not equals or not all(key.split('.')):
                raise argparse.ArgumentError(self, f'needs KEY=VALUE pairs; got {pair}')
            if value.startswith(('{', 'dict(')):
                raise argparse.ArgumentError(
                    self,
                    f'takes no dictionary ({pair}): give its entries one by one, as '
                    f'{key}.NAME=VALUE',
                )
            try:
                options[key] = self._parse(key, value)
            except (ValueError, AssertionError, RecursionError):
                raise argparse.ArgumentError(
                    self,
                    'needs KEY=VALUE pairs, brackets balanced and around all of a list; got '
                    f'{pair}',
                ) from None
        setattr(namespace, self.dest, options)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError('must be 1 or more')
    return int(text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that mmdet's train and test tools share."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs, such as '
        'model.budget.threshold=0.4; a list is key="[a,b]" or key=a,b',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes it; the environment variable is what is read.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument(
        '--no-data-check',
        action='store_true',
        help='start without looking through annotations and image files first',
    )


def add_baseline_argument(parser: argparse.ArgumentParser) -> None:
    """Plain detectors to compare with, see `dynamicdet.measuring.baselines.parse_baselines`."""
    parser.add_argument(
        '--baseline',
        nargs='+',
        action='append',
        metavar=('CONFIG CHECKPOINT', 'SIZE'),
        help='a plain detector to compare with on the same images and, if you like, the sizes to '
        'run it at instead of its own; may be given several times',
    )


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """The wanted speed, one way of five."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--hard-share', type=float, help='share of hard images, 0 to 1')
    group.add_argument('--target-latency', type=float, help='mean seconds per image')
    group.add_argument(
        '--throughput', type=float, help='images per second: a latency of 1 / THROUGHPUT'
    )
    group.add_argument(
        '--target-gflops', type=float, help='mean GFLOPs per image, 2 x multiply-adds'
    )
    group.add_argument('--threshold', type=float, help='hard above this difficulty, -1 to 1')


def add_record_arguments(parser: argparse.ArgumentParser, *splits: str) -> None:
    """What to record, and how: ``--split``, ``--device`` and ``--view``."""
    also = "; train takes the training images under the test's pipeline" * ('train' in splits)
    parser.add_argument(
        '--split', choices=splits, default='test', help=f'data: test by default{also}'
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
