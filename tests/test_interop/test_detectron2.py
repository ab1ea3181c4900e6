"""Detectron2's model zoo: its detections, and every key of its models."""

import pickle

import numpy as np
import pytest
import torch
from foreign import DATA, build, build_shapes, convert, detectron2_shapes, reference, weights
from mmengine.hub import get_config

from conftest import ROOT
from dynamicdet.cascade.weights import require_complete
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.detectron2 import DETECTRON2
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

REFERENCE = 'detectron2_faster_rcnn_r_50_fpn_3x'
MASKS = 'detectron2_mask_rcnn_r_50_fpn_3x.keys'
STATIC = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py'
DYNAMIC = 'dy_faster_rcnn_detectron2'
R_50, R_101 = (3, 4, 6, 3), (3, 4, 23, 3)


@pytest.fixture(scope='module')
def zoo_file(tmp_path_factory):
    """The reference's weights as the zoo packs them."""
    path = tmp_path_factory.mktemp('zoo') / 'model_final.pkl'
    state = weights.checkpoint(DATA / f'{REFERENCE}.json', 'detectron2')
    # Older files of the zoo have them.
    state['proposal_generator.anchor_generator.cell_anchors.0'] = np.zeros((3, 4), np.float32)
    path.write_bytes(pickle.dumps(dict(model=state, __author__='Detectron2 Model Zoo'), protocol=2))
    return path


def agreeing(model):
    """How many of the recorded detections a model finds: same class, 0.01 pixel, 1e-4 in score."""
    recorded = reference(REFERENCE)
    image = torch.from_numpy(weights.inputs(recorded['input']))
    size = tuple(image.shape[1:])
    sample = DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), pad_shape=size)
    )
    found = model.eval().test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
    wanted = recorded['detections']
    assert len(found) == wanted['n'] == 100
    agree = 0
    for box, score, label in zip(wanted['boxes_xyxy'], wanted['scores'], wanted['labels']):
        same = (
            ((found.bboxes - found.bboxes.new_tensor(box)).abs().amax(1) <= 0.01)
            & ((found.scores - score).abs() <= 1e-4)
            & (found.labels == label)
        )
        agree += bool(same.any())
    return agree


def test_static_parity(zoo_file, tmp_path, monkeypatch):
    status, said, complained = convert(
        monkeypatch, zoo_file, 'detectron2', STATIC, tmp_path / 'x.pth'
    )
    assert status == 0, complained
    assert '1 known and unneeded: anchors' in said
    model = MODELS.build(get_config(STATIC).model)
    state = read_checkpoint(str(tmp_path / 'x.pth'))['state_dict']
    model.load_state_dict(state, strict=True)
    assert agreeing(model) >= 98


def test_dynamic_parity_of_both_exits(zoo_file, tmp_path, monkeypatch):
    config = ROOT / f'configs/{DYNAMIC}.py'
    status, said, complained = convert(
        monkeypatch, zoo_file, 'detectron2', config, tmp_path / 'x.pth'
    )
    assert status == 0, complained
    model = build(DYNAMIC)
    model.load_state_dict(read_checkpoint(str(tmp_path / 'x.pth'))['state_dict'], strict=True)
    # Without trained connections the second backbone is the first.
    for threshold in (1, -1):
        model.set_budget(threshold=threshold)
        assert agreeing(model) >= 98


@pytest.mark.parametrize('name, masks', [(REFERENCE, False), (MASKS, True)])
def test_shapes_are_the_zoos(name, masks):
    recorded = {key: tuple(shape) for key, shape in reference(name)['state_dict']}
    assert detectron2_shapes(R_50, masks=masks) == recorded


@pytest.mark.parametrize('kind', ['faster', 'mask'])
@pytest.mark.parametrize(
    'variant, shapes',
    [
        ('', dict(blocks=R_50)),
        ('_r101', dict(blocks=R_101)),
        ('_x101', dict(blocks=R_101, groups=32, width=8)),
    ],
    ids=['r50', 'r101', 'x101'],
)
def test_every_key_at_full_size(kind, variant, shapes):
    model = build_shapes(f'dy_{kind}_rcnn_detectron2{variant}')
    state = {
        key: torch.empty(shape, device='meta')
        for key, shape in detectron2_shapes(**shapes, masks=kind == 'mask').items()
    }
    found, skipped = apply_rules(DETECTRON2.rules(model), state)
    require_complete(model, model.spread_plain_weights(found), DETECTRON2.kept)
    assert len(found) == len(state) and not skipped


@pytest.mark.parametrize(
    'options, said',
    [
        ({'model.detector.data_preprocessor.bgr_to_rgb': True}, 'bgr_to_rgb'),
        ({'model.detector.data_preprocessor.mean': [123.675, 116.28, 103.53]}, 'mean'),
        ({'model.detector.data_preprocessor.std': [57.375, 57.12, 58.395]}, 'std'),
        ({'model.backbone.style': 'pytorch'}, 'style'),
    ],
)
def test_configs_that_would_load_and_see_other_images(options, said):
    model = build(DYNAMIC, **{'model.backbone.base_channels': 4, **options})
    with pytest.raises(UsageError, match=f'differs in {said}. '):
        DETECTRON2.rules(model)
