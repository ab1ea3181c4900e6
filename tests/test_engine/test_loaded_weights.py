"""A training that starts from another detector's weights says in one line what they fill."""

import copy
from pathlib import Path

import torch

from conftest import load_small, train
from mmdet.registry import MODELS


def test_published_weights_with_other_classes(digits, tmp_path):
    cfg = load_small(
        'dy_faster_rcnn_digits', digits, tmp_path / 'run', **{'train_cfg.max_epochs': 1}
    )
    stock = copy.deepcopy(dict(cfg.model.detector, backbone=cfg.model.backbone))
    stock['roi_head']['bbox_head']['num_classes'] = 80
    # Bare weights, as many publish them.
    torch.save(MODELS.build(stock).state_dict(), tmp_path / 'published.pth')
    cfg.load_from = str(tmp_path / 'published.pth')
    cfg.custom_hooks.append(dict(type='EMAHook'))
    runner = train(cfg)
    log = ''.join(path.read_text() for path in Path(runner.work_dir).glob('*/*.log'))
    lines = [
        line for line in log.splitlines() if 'published.pth' in line and 'fills both exits' in line
    ]
    assert len(lines) == 1 and 'roi_head.bbox_head.fc_cls' in lines[0]
    assert 'size mismatch' not in log and 'missing keys' not in log
