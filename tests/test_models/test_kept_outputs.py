"""Losses from what a detector gave for a batch are those of each image by itself."""

import copy

import pytest
import torch
from mmengine.config import Config

from conftest import ROOT
from dynamicdet.measuring.calibration import exit_states
from dynamicdet.models.kept_outputs import kept_outputs
from dynamicdet.models.paired_losses import ExitView, paired_losses
from dynamicdet.models.resolution import reduce_samples
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


@torch.no_grad()
def test_proposals_for_losses_and_for_tests_come_from_one_pass():
    """Bit by bit what each makes by itself; where they differ by more than number, each does."""
    config = tiny_dynamic('faster_rcnn')
    rpn, proposal = config.detector.test_cfg.rpn, config.detector.train_cfg.rpn_proposal
    proposal.update(nms_pre=rpn.nms_pre, max_per_img=40)
    rpn.max_per_img = 7
    model = randomize(MODELS.build(config)).eval()
    data = model.data_preprocessor(tiny_batch((2, 1)), False)
    branch, maps = model.branch(0), model.backbone.first_maps(data['inputs'])
    samples = reduce_samples(data['data_samples'], (1.0, 1.0))

    def detect():
        found = branch.predict(maps, copy.deepcopy(samples), rescale=False)
        return [one.pred_instances.bboxes for one in found]

    def lose(outputs):
        view = ExitView(branch, tuple(m[1:] for m in maps), samples[1], (1.0, 1.0), outputs, 1)
        return paired_losses([view])[0]

    alone = detect()
    with kept_outputs(branch) as kept:
        together = detect()
    assert [len(own) for own in kept.proposals] == [40, 40] and len(alone[0]) > 0
    assert all(map(torch.equal, alone, together))
    assert 'predict_by_feat' not in vars(branch.rpn_head)
    losses = lose(kept)
    # Asked again, nothing was written into; and priors and their flags were made once.
    again = lose(kept)
    assert len(kept.priors) == 2
    kept.proposals = []
    by_itself = lose(kept)
    for name, value in by_itself.items():
        for one in (losses, again):
            assert all(map(torch.equal, _listed(value), _listed(one[name]))), name
    branch.test_cfg.rpn.nms_pre -= 1
    with kept_outputs(branch) as kept:
        detect()
    assert kept.proposals == []


def _listed(value):
    return value if isinstance(value, list) else [value]
