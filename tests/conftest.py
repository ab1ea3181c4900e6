"""What tests share: mmdet's scope, a small copy of the built-in data, a small run."""
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Optional

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import dynamicdet  # noqa: F401  (registers)
from dynamicdet.datasets.digits import make_digits
from mmdet.utils import register_all_modules

ROOT = Path(__file__).parents[1]
#: Enough for an AP above 0 on the training images.
CASCADE_EPOCHS = 12

# Two threads that wait for each other cost more than one on models this small.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'


#: For tests of what runs graphs; see test_deploy/test_openvino.py.
RUNTIMES_TO_TRY = ('onnxruntime', pytest.param('openvino', marks=pytest.mark.openvino))


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """The built-in data set with 12 training images, 6 for validation and 6 for test, 64 pixels."""
    root = tmp_path_factory.mktemp('data') / 'digits'
    return make_digits(root, dict(train=12, val=6, test=6), image_size=64)


def shrink_options(digits: Path) -> dict:
    """Overrides that make the digits configs run in seconds on the small data."""
    options = {
        'data_root': f'{digits}/',
        'model.backbone.base_channels': 8,
        'model.detector.neck.in_channels': [8, 16, 32, 64],
        'train_dataloader.batch_size': 4,
        # All of the small set, for either step.
        'train_dataloader.dataset.indices': None,
        'default_hooks.logger.interval': 1,
    }
    for split in ('train', 'val', 'test'):
        options[f'{split}_dataloader.dataset.data_root'] = f'{digits}/'
        options[f'{split}_dataloader.num_workers'] = 0
        options[f'{split}_dataloader.persistent_workers'] = False
        if split != 'train':
            options[f'{split}_evaluator.ann_file'] = f'{digits}/annotations/instances_{split}.json'
    return options


@pytest.fixture
def small_config(digits, tmp_path):
    """``small_config(name, **options)``: a digits config, shrunk, whose work dir is ``tmp_path/name``."""

    def load(name: str, **options) -> Config:
        cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        cfg.merge_from_dict({**shrink_options(digits), **options})
        cfg.work_dir = str(tmp_path / name)
        return cfg

    return load


def run_tool(name: str, *arguments: object, timeout: float = 300, cwd: Path = ROOT, **environment):
    """Run a tool in a process of its own.

    Returns:
        subprocess.CompletedProcess: With ``returncode``, ``stdout`` and ``stderr``.
    """
    return subprocess.run([sys.executable, str(ROOT / 'tools' / name), *map(str, arguments)],
                          cwd=cwd, env={**os.environ, **environment}, timeout=timeout,
                          capture_output=True, text=True)


def load_small(name: str, digits: Path, work_dir: Path, val: bool = False, **options) -> Config:
    """A digits config, shrunk, for a run in ``work_dir``; without validation unless asked for."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict({**shrink_options(digits), **options})
    if not val:
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.work_dir = str(work_dir)
    # mmengine keeps logs and scalars by this name and the second: two runs must not share them.
    cfg.experiment_name = f'{name}-{uuid.uuid4().hex[:8]}'
    return cfg


def load_small_router(digits: Path,
                      work_dir: Path,
                      cascade: Optional[Path],
                      delta: str = 'exact',
                      **options) -> Config:
    """Step 2, shrunk: from the last checkpoint in ``cascade``, with a learning rate to be felt."""
    cfg = load_small('dy_faster_rcnn_digits_router', digits, work_dir, **{
        'param_scheduler': [],
        'optim_wrapper.accumulative_counts': 1,
        'optim_wrapper.optimizer.lr': 1e-2,
        'train_cfg.max_epochs': 1,
        **options
    })
    cfg.custom_hooks[-1].update(cascade=str(cascade) if cascade else None, delta=delta)
    return cfg


def train(cfg: Config) -> Runner:
    """Run a config to its end, in this process."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.fixture(scope='session')
def cascade(digits, tmp_path_factory) -> Path:
    """Work dir of a step 1 that was trained until it finds some of its training images' digits."""
    register_all_modules(init_default_scope=True)
    work_dir = tmp_path_factory.mktemp('cascade')
    train(load_small('dy_faster_rcnn_digits', digits, work_dir, **{
        'param_scheduler': [],
        'optim_wrapper.optimizer.lr': 2e-3,
        'train_cfg.max_epochs': CASCADE_EPOCHS,
        'default_hooks.checkpoint.interval': CASCADE_EPOCHS,
    }))
    return work_dir
