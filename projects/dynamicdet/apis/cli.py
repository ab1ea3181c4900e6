"""What the command line tools share."""
import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Callable, Iterable, NoReturn, Optional

from mmengine.config import Config, DictAction
from tqdm import tqdm

from mmdet.utils import register_all_modules

from ..checkpoints import weights_only
from ..datasets.check import check_dataloaders
from ..errors import UsageError


def run(main: Callable[[], Optional[int]]) -> NoReturn:
    """Run a tool. What its user got wrong is one line on stderr and status 2, not a trace."""
    try:
        with weights_only():
            sys.exit(main())
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that mmdet's train and test tools share."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value pairs, such as model.budget.threshold=0.4; '
        'a list is key="[a,b]" or key=a,b')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes it; the environment variable is what is read.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument(
        '--no-data-check',
        action='store_true',
        help='start without looking through annotations and image files first')


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """The wanted speed, one way of three."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--hard-share', type=float, help='share of hard images, 0 to 1')
    group.add_argument('--target-latency', type=float, help='mean seconds per image')
    group.add_argument('--threshold', type=float, help='hard above this difficulty, -1 to 1')


def budget_from(args: argparse.Namespace) -> dict:
    """The budget that was asked for: no entry or one."""
    names = ('hard_share', 'target_latency', 'threshold')
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def load_config(args: argparse.Namespace) -> Config:
    """Read a config with the command line's overrides.

    Sets ``launcher``, ``work_dir`` (command line, else config, else ``work_dirs/NAME``) and the rank, as
    mmdet's tools do.

    Raises:
        UsageError: If the config is missing or cannot be read.
    """
    os.environ.setdefault('LOCAL_RANK', str(getattr(args, 'local_rank', 0)))
    register_all_modules(init_default_scope=False)
    if not Path(args.config).is_file():
        raise UsageError(f"there is no config at '{args.config}'")
    try:
        cfg = Config.fromfile(args.config)
    except (SyntaxError, KeyError, FileNotFoundError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the config '{args.config}' cannot be read: {reason}") from error
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = getattr(args, 'launcher', 'none')
    cfg.work_dir = (
        getattr(args, 'work_dir', None) or cfg.get('work_dir')
        or str(Path('work_dirs') / Path(args.config).stem))
    return cfg


def require_file(path: str, what: str) -> None:
    """Raise a `UsageError` unless there is a file, or the path is a URL or a name that mmengine
    resolves."""
    if '://' not in path and not Path(path).is_file():
        raise UsageError(f"there is no {what} at '{path}'")


def check_data(cfg: Config, *splits: str) -> None:
    """Look through the data before a run; on rank 0, which prints what is odd."""
    if int(os.environ.get('RANK', 0)) == 0:
        for line in check_dataloaders(cfg, splits, progress=counter('image files')):
            print(f'data: {line}', file=sys.stderr)


def quiet() -> None:
    """Hide what libraries say of each other and no user can change."""
    for pattern in ('.*pkg_resources.*', '.*torch.meshgrid.*', '.*FileClient.*'):
        warnings.filterwarnings('ignore', message=pattern)


def progress(steps: Iterable, what: str) -> tqdm:
    """A progress bar with an ETA; a line every ten seconds where the output is no terminal."""
    return tqdm(steps, desc=what, mininterval=0.5 if sys.stderr.isatty() else 10, leave=False)


def counter(what: str) -> Callable[[int, int], None]:
    """The same for those who count: call it with how many are done and how many there are."""
    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or progress(range(total), what)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return update
