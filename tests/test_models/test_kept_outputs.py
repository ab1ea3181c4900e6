"""Losses from what a detector gave for a batch are those of each image by itself."""

import copy

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.measuring.calibration import exit_states
from dynamicdet.models.kept_outputs import kept_outputs
from dynamicdet.testing import randomize, shrink, tiny_batch, tiny_dynamic
from mmdet.registry import MODELS

#: Detector -> classes of the parts whose outputs are kept.
KEPT = {
    'faster_rcnn': ['FPN', 'RPNHead'],
    'mask_rcnn': ['FPN', 'RPNHead'],
    'cascade_rcnn': ['FPN', 'RPNHead'],
    'retinanet': ['FPN', 'RetinaHead'],
    # Its head decodes boxes where it is not flagged as training.
    'fcos': ['FPN'],
    'atss': ['FPN', 'ATSSHead'],
    'gfl': ['FPN', 'GFLHead'],
    'yolox': ['YOLOXPAFPN', 'YOLOXHead'],
}
SHIPPED = {
    'dy_yolov7': ['YOLOV7PAFPN', 'YOLOV7Head'],
    'dy_rtmdet_s': ['CSPNeXtPAFPN', 'RTMDetSepBNHead'],
    'dy_rtmdet-ins_s': ['CSPNeXtPAFPN', 'RTMDetInsSepBNHead'],
    'dy_dino_r50': ['ChannelMapper'],
}


def build(name):
    if name in SHIPPED:
        return shrink(Config.fromfile(ROOT / f'configs/{name}.py').model)
    config = tiny_dynamic(name)
    if name == 'fcos':
        config.detector.bbox_head.norm_on_bbox = True
    return config


@torch.no_grad()
@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('name', [*KEPT, *SHIPPED])
def test_losses_are_those_of_each_image(name, shared):
    model = randomize(MODELS.build({**build(name), 'shared': shared, 'train_router': True})).eval()
    masks = name in ('mask_rcnn', 'dy_rtmdet-ins_s')
    data = model.data_preprocessor(tiny_batch((2, 1, 3), masks=masks), False)
    inputs, samples = data['inputs'], data['data_samples']
    expected, _ = model.exit_losses(inputs, copy.deepcopy(samples))
    forwards = {part: vars(part).get('forward') for part in model.modules()}
    every, outputs = list(exit_states(model, inputs, samples)), []
    for state in every:
        with kept_outputs(model.branch(state.exit)) as kept:
            model.finish(state)
        outputs.append(kept)
        assert [type(part).__name__ for part in kept] == {**KEPT, **SHIPPED}[name]
    losses = model.losses_of_states(every, outputs)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    assert losses.isfinite().all() and not torch.equal(losses[0], losses[1])
    # Everything is as it was.
    assert forwards == {part: vars(part).get('forward') for part in model.modules()}


def test_what_is_written_into_is_not_kept():
    model = randomize(MODELS.build(tiny_dynamic('retinanet'))).eval()
    data = model.data_preprocessor(tiny_batch((2, 1)), False)
    maps = model.backbone.select(model.backbone.first_maps(data['inputs']))
    branch = model.branch(0)
    with torch.no_grad(), kept_outputs(branch) as kept:
        scores, _ = branch.bbox_head(branch.neck(maps))
        assert set(kept) == {branch.neck, branch.bbox_head}
        scores[0].sigmoid_()
    assert set(kept) == {branch.neck}
    assert not branch.neck._forward_hooks and not branch.bbox_head._forward_hooks
