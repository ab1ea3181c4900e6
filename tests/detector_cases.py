"""What tests of detectors share: mmdet's scope, a small copy of the built-in data, small runs.

conftest.py hands it on where OpenMMLab's packages are installed.
"""

import json
import logging
import os
import runpy
import socket
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from far_device import far_device
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from quick_configs import make_configs_quick
from scipy.optimize import linear_sum_assignment
from suite_settings import ROOT, SEED
from tool_server import ToolServer

import dynamicdet  # noqa: F401  (registers)
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.datasets.digits import make_digits
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring.calibration import record_exits
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

make_configs_quick()

#: Exits differ after so many, and routers tell images apart; what they find is left to chance, see
#: `findable`.
CASCADE_EPOCHS = 12


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules(init_default_scope=True)


@pytest.fixture(autouse=True)
def open_loggers():
    """mmengine's loggers outlive the test that made them, and pytest closes what was its stdout:
    they get that of this test."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and handler.stream.closed:
                # setStream() would flush the closed one.
                handler.stream = sys.stdout


@pytest.fixture
def far(monkeypatch):
    """A device that is not the CPU, see far_device.py."""
    with far_device(monkeypatch) as device:
        yield device


def instances(*boxes):
    """Objects with these corners; their classes are 0, 1, 2, 0, ..."""
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(boxes)) % 3,
    )


def no_progress(steps, _):
    """In the place of a progress bar."""
    return steps


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """The built-in data set with 12 training images, 6 for validation and 6 for test, 64 pixels."""
    root = tmp_path_factory.mktemp('data') / 'digits'
    return make_digits(root, dict(train=12, val=6, test=6), image_size=64)


def shrink_options(digits: Path) -> dict:
    """Overrides that make the digits configs run in seconds on the small data."""
    options = {
        'randomness.seed': SEED,
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
    """``small_config(name, **options)``: a digits config, shrunk, whose work dir is
    ``tmp_path/name``."""

    def load(name: str, **options) -> Config:
        cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        cfg.merge_from_dict({**shrink_options(digits), **options})
        cfg.work_dir = str(tmp_path / name)
        return cfg

    return load


#: Started by the first test that runs a tool.
_tools: ToolServer | None = None


def tool_server() -> ToolServer:
    global _tools
    _tools = _tools or ToolServer()
    return _tools


def run_tool(
    name: str | Path,
    *arguments: object,
    timeout: float = 900,
    cwd: Path = ROOT,
    ranks: int = 1,
    **environment,
):
    """Run a tool, or another script, in a process of its own. The limit is for one that hangs.

    Returns:
        subprocess.CompletedProcess: With ``returncode``, ``stdout`` and ``stderr``.
    """
    if ranks > 1:
        environment.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    return tool_server().run(
        ROOT / 'tools' / name, arguments, cwd, {**os.environ, **environment}, timeout, ranks
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def call_tool(name: str, *arguments: object) -> int:
    """Run a tool in this process; the status that it ends with."""
    kept = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
    except SystemExit as ended:
        return ended.code or 0
    finally:
        sys.argv = kept


def recordable_options(name: str, digits: Path) -> dict:
    """`shrink_options` of a config of a two-stage detector or of YOLOX, which is small as it is."""
    options = shrink_options(digits)
    if 'yolox' in name:
        options = {key: value for key, value in options.items() if not key.startswith('model.')}
    return options


def write_random(cfg: Config, path: Path, **meta) -> str:
    """A checkpoint of random weights that find something at either exit and tell images apart."""
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for branch in model.branches:
        if hasattr(branch, 'roi_head'):
            branch.roi_head.bbox_head.fc_cls.weight.data *= 30
        else:
            head = branch.bbox_head
            for conv in [*head.multi_level_conv_obj, *head.multi_level_conv_cls]:
                torch.nn.init.normal_(conv.weight, std=0.1)
                torch.nn.init.zeros_(conv.bias)
    model.router.fc2.weight.data *= 30
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def load_small_static(name: str, digits: Path, work_dir: Path, epochs: int, options: dict):
    """`load_small` of a detector that is not dynamic, in few steps from random weights."""
    few = {
        'model.neck.in_channels': [8, 16, 32, 64],
        'param_scheduler': [],
        'optim_wrapper.optimizer.lr': 1e-3,
        'load_from': None,
        'train_cfg.max_epochs': epochs,
    }
    cfg = load_small(name, digits, work_dir, **{**few, **options})
    # The detector that `shrink_options` also sets is a dynamic one's.
    cfg.model.pop('detector')
    return cfg


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


def load_small_router(
    digits: Path, work_dir: Path, cascade: Path | None, delta: str = 'exact', **options
) -> Config:
    """Step 2, shrunk: from the last checkpoint in ``cascade``, with a learning rate to be felt."""
    cfg = load_small(
        'dy_faster_rcnn_digits_router',
        digits,
        work_dir,
        **{
            'param_scheduler': [],
            'optim_wrapper.accumulative_counts': 1,
            'optim_wrapper.optimizer.lr': 1e-2,
            'train_cfg.max_epochs': 1,
            **options,
        },
    )
    cfg.custom_hooks[-1].update(cascade=str(cascade) if cascade else None, delta=delta)
    return cfg


def train(cfg: Config) -> Runner:
    """Run a config to its end, in this process."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.fixture(scope='session')
def cascade(digits, tmp_path_factory) -> Path:
    """Work dir of a step 1 that was trained a little."""
    register_all_modules(init_default_scope=True)
    work_dir = tmp_path_factory.mktemp('cascade')
    train(
        load_small(
            'dy_faster_rcnn_digits',
            digits,
            work_dir,
            **{
                'param_scheduler': [],
                'optim_wrapper.optimizer.lr': 2e-3,
                'train_cfg.max_epochs': CASCADE_EPOCHS,
                'default_hooks.checkpoint.interval': CASCADE_EPOCHS,
            },
        )
    )
    return work_dir


def on_findable(findable: Path) -> dict:
    """Overrides that make `findable` the test set, and let the detector show even what it is hardly
    sure of."""
    return {
        'test_dataloader.dataset.ann_file': str(findable),
        'test_dataloader.dataset.data_prefix.img': 'train/',
        'test_evaluator.ann_file': str(findable),
        'model.detector.test_cfg.rcnn.score_thr': 0.0,
    }


@pytest.fixture(scope='session')
def findable(digits, cascade, tmp_path_factory) -> Path:
    """Annotations of the training images whose objects are what the cascade finds first in them, so
    that its AP is far from 0 and from 100, whatever it has learned: three boxes of one exit and one
        of the other, by turns. Every
    second box is narrowed to an IoU of 0.775."""
    register_all_modules(init_default_scope=True)
    path = digits / 'annotations' / 'instances_train.json'
    cfg = load_small('dy_faster_rcnn_digits', digits, cascade, **on_findable(path))
    model, _ = load_dynamic_detector(cfg, latest_checkpoint(cascade), 'cpu')
    images = record_exits(model, build_loader(cfg.test_dataloader), lambda steps, _: steps)
    content, objects = json.loads(path.read_text()), []
    for row, image in enumerate(images):
        for exit, found in enumerate(image['detections']):
            for one in found[: 3 if row % 2 == exit else 1]:
                left, top, width, height = one['bbox']
                width *= 0.775 if len(objects) % 2 else 1
                objects.append(
                    dict(
                        id=len(objects) + 1,
                        image_id=image['id'],
                        bbox=[left, top, width, height],
                        area=width * height,
                        iscrowd=0,
                        category_id=one['category_id'],
                    )
                )
    path = tmp_path_factory.mktemp('findable') / 'findable.json'
    path.write_text(json.dumps({**content, 'annotations': objects}))
    return path


def spread_scores(model: torch.nn.Module) -> torch.nn.Module:
    """Of a RetinaNet with random weights, whose scores would all be 1: which comes first, and so
    what is suppressed, would be a matter of rounding."""
    for name, weight in model.named_parameters():
        if name.endswith('retina_cls.weight'):
            weight.data *= 0.03
    return model


def _rows(detections) -> np.ndarray:
    """Box, score and label of each, (n, 6), of an ``InstanceData`` or of COCO's results without
    image ids."""
    if isinstance(detections, list):
        return np.array(
            [[*one['bbox'], one['score'], one['category_id']] for one in detections]
        ).reshape(-1, 6)
    found = detections.detach().cpu()
    return np.column_stack([found.bboxes, found.scores, found.labels])


def same_detections(found, wanted) -> bool:
    """Whether two results are the same, one to one: label, score within 0.001, box within 0.01
    pixels and a thousandth of how far it reaches (random weights make much of rounding). Order
    counts where scores differ by more."""
    found, wanted = _rows(found), _rows(wanted)
    if len(found) != len(wanted) or (np.abs(found[:, 4] - wanted[:, 4]) > 1e-3).any():
        return False
    large = np.abs(wanted[:, :4]).max(1, initial=0)
    near = np.column_stack([1e-2 + 1e-3 * large] * 4 + [np.full((len(wanted), 2), [1e-3, 0.5])])
    apart = (np.abs(found[:, None] - wanted) > near).any(2)
    return not apart[linear_sum_assignment(apart)].any()
