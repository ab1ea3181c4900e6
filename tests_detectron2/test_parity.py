"""The same weights on both sides: maps, difficulties and detections."""

import json

import pytest
import reference
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from test_package import tool

import dynamicdet_detectron2 as project
from conftest import build, wake
from dynamicdet.errors import UsageError
from dynamicdet.exchange.detectron2 import convert_checkpoint, convert_dynamic
from dynamicdet.exchange.origin import framework_of, require_mmdet

RECORDED = json.loads(reference.TARGET.read_text())


@pytest.fixture(scope='module')
def model():
    """Of full size, with the weights of the reference."""
    cfg = get_cfg()
    project.add_dynamicdet_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file('COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml'))
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = 'DynamicDetector', 'cpu'
    model = build_model(cfg).eval()
    plain = {key: torch.from_numpy(value) for key, value in reference.plain_state().items()}
    state = model.spread_plain_weights(plain)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state |= {key: torch.as_tensor(v) for key, v in reference.own_state(shapes).items()}
    assert set(shapes) <= {*state, 'threshold', 'delta', 'difficulties', 'latencies', 'gflops'} | {
        'platt_scale',
        'platt_shift',
    }
    model.load_state_dict({**model.state_dict(), **state})
    return model


def agreeing(detections, boxes, scores, labels):
    """How many recorded detections are found: same class, 0.01 pixel, 1e-4 in score."""
    count = 0
    for box, score, label in zip(boxes, scores, labels):
        distance = (detections.pred_boxes.tensor - torch.tensor(box)).abs().amax(1)
        same = (distance <= 0.01) & ((detections.scores - score).abs() <= 1e-4)
        count += bool((same & (detections.pred_classes == label)).any())
    return count


@torch.no_grad()
def test_maps_difficulties_and_detections(model):
    pixels = torch.from_numpy(reference.image())
    images = model.preprocess([dict(image=pixels)])
    first, _ = model.first_maps(images)
    second, _ = model.deeper_maps(1, None, first)
    for maps, recorded in zip((first, second), RECORDED['maps']):
        for values, wanted in zip(maps, recorded, strict=True):
            scale = values.abs().max()
            got = values.flatten()[:: reference.EVERY]
            assert (got - torch.tensor(wanted)).abs().max() <= 1e-4 * max(1, scale)
    # The connections matter here.
    assert not torch.allclose(first[-1], second[-1], atol=0.1)
    for exit, (threshold, wanted) in enumerate(zip((1, -1), RECORDED['exits'])):
        model.set_budget(threshold=threshold)
        (result,) = model([dict(image=pixels)])
        assert result['exit'] == exit
        assert result['difficulty'] == pytest.approx(RECORDED['difficulty'], abs=1e-4)
        assert len(result['instances']) == len(wanted['scores']) == 100
        assert agreeing(result['instances'], **wanted) >= 98


@pytest.mark.parametrize('kind', ['faster', 'mask', 'cascade'])
def test_a_round_trip_is_bit_equal(kind):
    model = build(kind, shared=False)
    wake(model)
    model.difficulties = torch.rand(9)
    content = dict(model=model.state_dict(), calibration=dict(lat1=1.0))
    there = convert_checkpoint(content, 'mmdet')
    assert framework_of(there['state_dict']) == 'mmdet'
    assert there['meta']['calibration'] == dict(lat1=1.0)
    back = convert_checkpoint(there, 'detectron2')
    assert back['model'].keys() == content['model'].keys()
    for key, value in content['model'].items():
        assert back['model'][key] is value or torch.equal(back['model'][key], value), key
    build(kind, shared=False, options=()).load_state_dict(back['model'], strict=False)


def test_what_is_not_converted():
    model = build('faster')
    with pytest.raises(UsageError, match='of detectron2 already'):
        convert_dynamic(model.state_dict(), 'detectron2')
    with pytest.raises(UsageError, match='of a plain detector'):
        convert_dynamic(model.as_plain(), 'mmdet')
    with pytest.raises(UsageError, match='Faster, Mask and Cascade R-CNN with ResNet and FPN'):
        convert_dynamic(build('retinanet').state_dict(), 'mmdet')
    with pytest.raises(UsageError, match='some channels of this detector were removed'):
        convert_checkpoint(dict(model=model.state_dict(), removed_channels=dict(a=[1])), 'mmdet')
    with pytest.raises(UsageError, match='one of MMDetection is wanted'):
        require_mmdet(model.state_dict())


def test_the_tool_converts_files(tmp_path):
    model = build('faster')
    torch.save(dict(model=model.state_dict(), iteration=7), tmp_path / 'model_final.pth')
    code, said, error = tool(
        'convert_checkpoint', tmp_path / 'model_final.pth', '--to', 'mmdet',
        '--out', tmp_path / 'epoch_1.pth',
    )  # fmt: skip
    assert code == 0, error
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    assert f'{len(state)} entries converted' in said and len(state) == len(model.state_dict())
    with pytest.raises(UsageError, match='convert it by'):
        project.DynamicCheckpointer(model).load(str(tmp_path / 'epoch_1.pth'))
