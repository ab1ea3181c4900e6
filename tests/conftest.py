"""What tests share: mmdet's scope, a small copy of the built-in data, a small run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import dynamicdet  # noqa: F401  (registers)
from dynamicdet.datasets.digits import make_digits
from mmdet.utils import register_all_modules

ROOT = Path(__file__).parents[1]

# Two threads that wait for each other cost more than one on models this small.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'


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
