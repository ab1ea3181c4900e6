"""What the command line tools share."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config
from mmengine.device import get_device
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

import mmdet
from dynamicdet_options import PATHS, ConfigOptions, add_budget_arguments, add_common_arguments  # noqa: F401  (tools and tests have them from here)
from mmdet.utils import register_all_modules

from .building import load_dynamic_detector, require_dynamic, require_model
from .cascade.weights import exits_digest
from .checkpoints import read_checkpoint, weights_only
from .datasets.annotation_repair import mend_annotations
from .datasets.check import check_dataloaders, is_of_empty_set
from .datasets.config_datasets import SEVERAL_FILES
from .errors import UsageError, reason_of
from .files import write_atomically
from .measuring.recording import build_record_loader, record_data_set, require_recordable
from .models import DynamicDetector
from .progress import counter, progress, silence  # noqa: F401  (tools have them from here)
from .routing.budget import BUDGET_NAMES, Budget
from .routing.budget_report import BudgetReport
from .routing.record import RoutingRecord, write_record

#: In front of the path of one of mmdet's configs, as in ``_base_``.
_OF_MMDET = 'mmdet::'


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool. What its user got wrong is one line on stderr and status 2, not a trace."""
    try:
        with weights_only():
            sys.exit(main())
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
    except Exception as error:
        # What is no user's mistake is raised again.
        if is_of_empty_set(error):
            print(
                'error: a data set of the config is empty: it has no image that can be used',
                file=sys.stderr,
            )
        elif _is_of_building(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f'error: what the config describes cannot be built: {reason_of(error)} (in '
                f'{Path(frame.filename).name}, line {frame.lineno})',
                file=sys.stderr,
            )
        else:
            raise
    sys.exit(2)


def _is_of_building(error: Exception) -> bool:
    """Whether an error came up while mmengine built what a config names, not while it ran."""
    return any(
        frame.filename.endswith('registry/build_functions.py') or frame.name == 'from_cfg'
        for frame in traceback.extract_tb(error.__traceback__)
    )


def require_record(args: argparse.Namespace, cfg: Config) -> None:
    """Raise a `UsageError` where `make_record` would, as far as that takes no time."""
    args.device = args.device or get_device()
    require_device(args.device)
    require_dynamic(cfg)
    require_recordable(cfg, args.split)
    check_settings(cfg, args.split)


def make_record(
    args: argparse.Namespace, cfg: Config, path: str | Path, any_router: bool = False
) -> tuple[DynamicDetector, DataLoader, RoutingRecord]:
    """Record a split of the data and write it: the detector, the data and the record.

    Args:
        args (Namespace): With `add_record_arguments` and `add_common_arguments`, after
            `require_record`.
        cfg (Config): Of a dynamic detector.
        path (str | Path): File to write.
        any_router (bool): Whether the router may be untrained, or another than the checkpoint's.
    """
    model, checkpoint = load_dynamic_detector(cfg, args.checkpoint, args.device, any_router)
    digest = exits_digest(checkpoint['state_dict'])
    check_data(cfg, args.split, files=not args.no_data_check)
    loader = build_record_loader(cfg, args.split)
    record = record_data_set(model, cfg, loader, progress, args.view, args.checkpoint)
    record.provenance['exits_digest'] = digest
    write_record(record, path)
    return model, loader, record


def budget_from(args: argparse.Namespace) -> Budget | None:
    """The budget that was asked for."""
    return Budget.parse({name: getattr(args, name) for name in BUDGET_NAMES})


def load_config(args: argparse.Namespace) -> Config:
    """Read a config with the command line's overrides; ``mmdet::PATH`` is one of MMDetection.

    Sets ``launcher``, ``work_dir`` (command line, else config, else ``work_dirs/NAME``) and the
    rank, as mmdet's tools do.

    Raises:
        UsageError: If the config is missing or cannot be read.
    """
    os.environ.setdefault('LOCAL_RANK', str(getattr(args, 'local_rank', 0)))
    args.config = config_path(args.config)
    cfg = read_config(args.config)
    override(cfg, args.cfg_options, args.config)
    require_model(cfg, args.config)
    apply_router_holdout(cfg)
    cfg.launcher = getattr(args, 'launcher', 'none')
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _join_on_cpu(cfg)
    cfg.work_dir = (
        getattr(args, 'work_dir', None)
        or cfg.get('work_dir')
        or str(Path('work_dirs') / Path(args.config).stem)
    )
    return cfg


def config_path(name: str) -> str:
    """The file of a config; ``mmdet::PATH`` is one of MMDetection's."""
    if name.startswith(_OF_MMDET):
        return str(Path(mmdet.__file__).parent / '.mim/configs' / name[len(_OF_MMDET) :])
    return name


def read_config(name: str) -> Config:
    """Read a config file, see `config_path`.

    Raises:
        UsageError: If it is missing or cannot be read.
    """
    register_all_modules(init_default_scope=False)
    path = config_path(name)
    if not Path(path).is_file():
        raise UsageError(f"there is no config at '{path}'")
    try:
        return Config.fromfile(path)
    except Exception as error:
        # A config is a program: it may raise anything.
        raise UsageError(f"the config '{path}' cannot be read: {reason_of(error)}") from error


def override(cfg: Config, options: dict | None, name: str) -> None:
    """Let ``--cfg-options`` count, the data's root wherever it was used; or raise a
    `UsageError`."""
    for key, value in (options or {}).items():
        if key.rpartition('.')[2] in PATHS and not isinstance(value, (str, type(None))):
            raise UsageError(
                f'--cfg-options {key} takes one path, not {value}'
                + SEVERAL_FILES * key.endswith('ann_file')
            )
    if 'data_root' in (options or {}):
        # First: what is named beside it is meant as it stands.
        _move_data(cfg, cfg.get('data_root'), options['data_root'])
    try:
        cfg.merge_from_dict(options or {})
    except (AttributeError, KeyError, TypeError) as error:
        # What mmengine raises where a key leads into a value that has no such part.
        raise UsageError(f"--cfg-options do not fit '{name}': {reason_of(error)}") from error
    if (options or {}).get('load_from'):
        # Given, not inherited, also where both are the same: it comes before step 1's result.
        for hook in cfg.get('custom_hooks') or ():
            if hook.get('type') == 'RouterHook':
                hook['cascade'] = None


def _move_data(cfg: Config, root: Any, new: Any) -> None:
    """Let an overridden ``data_root`` count wherever a config has used it: mmengine changes the
    name alone."""
    root = root.rstrip('/') if isinstance(root, str) else ''
    if not root or not isinstance(new, str):
        return

    def moved(value: Any) -> Any:
        # New containers: one that is used twice would be moved twice.
        if isinstance(value, dict):
            return type(value)({key: moved(entry) for key, entry in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(map(moved, value))
        inside = isinstance(value, str) and f'{value}/'.startswith(f'{root}/')
        return os.path.join(new, value[len(root) + 1 :]) if inside else value

    for key, value in cfg.items():
        cfg[key] = moved(value)


def apply_router_holdout(cfg: Config) -> None:
    """Let ``router_holdout``, a share of the training images in (0, 1), count: step 1 does not see
    them, and step 2 (``model.train_router``) sees no others. As if each training set were wrapped
    in `HoldOut`."""
    # Taken out, or a config that a run leaves would hold out twice.
    share = cfg.pop('router_holdout', None)
    if share is None or not cfg.get('train_dataloader'):
        return
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise UsageError(f'router_holdout is a share of the training images in (0, 1); got {share}')
    part, loader = 'router' if cfg.model.get('train_router') else 'cascade', cfg.train_dataloader

    def held(dataset: Any) -> dict:
        if not isinstance(dataset, dict) or 'type' not in dataset:
            raise UsageError(
                'router_holdout takes images out of data sets that are dicts with a type; '
                f'train_dataloader has {str(dataset)[:100]}'
            )
        if dataset['type'] == 'HoldOut':
            raise UsageError(
                'the training data are wrapped in HoldOut already: take that or router_holdout away'
            )
        if isinstance(dataset.get('datasets'), (list, tuple)):
            dataset['datasets'] = [held(part) for part in dataset['datasets']]
        elif 'dataset' in dataset:
            dataset['dataset'] = held(dataset['dataset'])
        else:
            return dict(type='HoldOut', dataset=dataset, share=share, part=part)
        return dataset

    held_out = held(loader.get('dataset') if isinstance(loader, dict) else loader)
    loader['dataset'] = held_out


def _join_on_cpu(cfg: Config) -> None:
    """Join the processes of a run over gloo. Left to itself, mmengine does it by way of CUDA."""
    torch.distributed.init_process_group('gloo')
    cfg.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )


def require_settings(cfg: Config, *names: str) -> None:
    """Raise a `UsageError` if a config lacks what a tool works on."""
    missing = [name for name in names if not cfg.get(name)]
    if missing:
        raise UsageError(f"the config '{cfg.filename}' has no {', no '.join(missing)}")


def require_checkpoint(path: str, remedy: str = '') -> dict:
    """Read a checkpoint before mmengine does, which would answer with a trace. The path may be a
    URL or a name that mmengine resolves.

    Args:
        path (str): Path, URL or name.
        remedy (str): What to do where there is none, if the path was not just typed.

    Raises:
        UsageError: If there is none, or it is no checkpoint.
    """
    if '://' not in path and not Path(path).is_file():
        raise UsageError(f"there is no checkpoint at '{path}'{remedy and ': '}{remedy}")
    return read_checkpoint(path)


def require_writable(path: str) -> None:
    """Raise a `UsageError` if a file could not be written: better before hours of work than
    after."""
    if Path(path).is_dir():
        raise UsageError(f"'{path}' is a folder, not a file to write")
    make_folder(str(Path(path).parent))


def make_folder(path: str) -> None:
    """Make a folder for results, or raise a `UsageError`."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder '{path}' cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"the folder '{path}' cannot be written to")


def require_device(device: str) -> None:
    """Raise a `UsageError` unless torch can compute on a device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device '{device}' cannot be used: {reason_of(error)}") from error


def check_settings(cfg: Config, *splits: str) -> None:
    """Check what takes no time, before a model is loaded: data sets can be built, and have the
    classes of the heads. `check_data` does that too; no annotation file is read here."""
    if _speaks():
        check_dataloaders(cfg, splits, files=False)


def check_data(cfg: Config, *splits: str, files: bool = True) -> None:
    """Look through the data before a run; rank 0 prints what is odd.

    Annotation files are read in any case, and on every rank: what is mended in them, the config
        then has.

    Args:
        cfg (Config): mmengine's config.
        splits (str): Which, of 'train', 'val' and 'test'.
        files (bool): Whether to look at boxes and image files, too, not at settings alone. Defaults
            to True.
    """
    check_settings(cfg, *splits)
    read, lines = mend_annotations(
        cfg, splits, Path(cfg.get('work_dir') or 'work_dirs') / 'annotations'
    )
    if _speaks() and files:
        lines += check_dataloaders(cfg, splits, counter('image files'), read=read)
    for line in lines if _speaks() else ():
        print(f'data: {line}', file=sys.stderr)


def _speaks() -> bool:
    """Whether this process is the one that prints."""
    return int(os.environ.get('RANK', 0)) == 0


def print_budget_report(budget_report: BudgetReport | None) -> None:
    """What was wanted and served, and what it cost; a warning where chance does not explain the
    difference."""
    if budget_report is not None:
        print(*budget_report.lines(), sep='\n')
        for doubt in budget_report.doubts():
            warnings.warn(doubt)


def say(what: str) -> None:
    """Tell what begins now, on stderr."""
    print(f'{what} ...', file=sys.stderr, flush=True)


def publish_analysis(
    record: RoutingRecord,
    coco: COCO,
    analysis: Mapping,
    out_dir: str | Path,
    title: str = 'What routing is worth',
    name: str = 'routing',
    with_figure: bool = False,
) -> None:
    """Write the page of what `analyze_routing` gave, and print what it says.

    Args:
        record (RoutingRecord): What was analyzed.
        coco (COCO): Its ground truth.
        analysis (Mapping): The numbers.
        out_dir (str or Path): Where the page goes.
        title (str): Of the page.
        name (str): Of the page's files. Defaults to 'routing'.
        with_figure (bool): Whether to write ``trade_off.png``, too. Defaults to False.
    """
    # matplotlib takes a while, and most tools do without.
    from .reports.figures import png, trade_off_figure
    from .reports.routing_analysis import format_analysis, write_analysis

    if with_figure:
        figure = trade_off_figure(analysis['rows'], analysis['baselines']['points'])
        write_atomically(png(figure), Path(out_dir) / 'trade_off.png')
    page = write_analysis(record, coco, analysis, out_dir, title, name)
    print(format_analysis(analysis))
    print(f'\nThe same with pictures: {page}')


def _say_warning(message: Any, category: type, filename: str, *args: Any) -> None:
    """The package's own warnings are a line without a place in its code."""
    is_ours = Path(filename).is_relative_to(Path(__file__).parent)
    print(
        f'warning: {message}'
        if is_ours
        else warnings.formatwarning(message, category, filename, *args[:1]).rstrip(),
        file=sys.stderr,
    )


def prepare() -> None:
    """Hide what libraries say of each other and no user can change, and say warnings in a line."""
    warnings.showwarning = _say_warning
    for pattern in (
        '.*pkg_resources.*',
        '.*torch.meshgrid.*',
        '.*FileClient.*',
        '.*num_anchors.*',
        'checkpoint is None.*',
        'Detected pickle protocol.*',
    ):
        warnings.filterwarnings('ignore', message=pattern)
