"""Trained dynamic detectors to Detectron2's names and back; files that are of the other framework.
What Detectron2 makes of them is in tests_detectron2."""

import pytest
import torch
from foreign import build, build_shapes

from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.exchange.detectron2 import convert_checkpoint, convert_dynamic
from dynamicdet.exchange.origin import framework_of

CONFIGS = ['dy_faster_rcnn_detectron2', 'dy_mask_rcnn_detectron2', 'dy_mask_rcnn_detectron2_x101']
THEIRS = {
    'backbone.first.stem.conv1.weight': torch.zeros(1),
    'branches.0.proposal_generator.rpn_head.conv.weight': torch.zeros(1),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_a_round_trip_is_the_same(name):
    state = build_shapes(name).state_dict()
    there = convert_checkpoint(dict(state_dict=state, meta=dict(epoch=3)), 'detectron2')
    assert framework_of(there['model']) == 'detectron2' and there['meta'] == dict(epoch=3)
    assert not any('layer' in key or 'neck' in key for key in there['model'])
    back = convert_checkpoint(there, 'mmdet')['state_dict']
    assert back.keys() == state.keys()
    assert all(back[key] is value for key, value in state.items())


def test_other_detectors_are_not_converted():
    state = build_shapes('dy_retinanet').state_dict()
    with pytest.raises(UsageError, match='are unknown to this source.*are converted'):
        convert_dynamic(state, 'detectron2')


def test_checkpoints_of_detectron2_are_refused(tmp_path):
    torch.save(dict(model=THEIRS, iteration=3), tmp_path / 'model_final.pth')
    with pytest.raises(UsageError, match="Detectron2's, and one of MMDetection is wanted: convert"):
        read_checkpoint(str(tmp_path / 'model_final.pth'))
    model = build('dy_faster_rcnn_detectron2', **{'model.backbone.base_channels': 4})
    with pytest.raises(UsageError, match="Detectron2's, and one of MMDetection is wanted"):
        model.load_state_dict(THEIRS, strict=False)


@pytest.mark.parametrize(
    'name', ['dy_yolox_s', 'dy_rtmdet_s', 'dy_fcos', 'dy_dino_r50', 'dy_yolov7']
)
def test_names_of_mmdet_are_not_taken_for_detectron2s(name):
    assert framework_of(build_shapes(name).state_dict()) != 'detectron2'
