"""Zoo files, own checkpoints, and those that are refused."""

import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from conftest import build, images, wake
from dynamicdet.errors import UsageError
from dynamicdet_detectron2 import DynamicCheckpointer


def write_zoo_file(path, model, **more):
    """As Detectron2's model zoo has them: numpy arrays, pickled."""
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    content = dict(model=arrays, __author__='Detectron2 Model Zoo', **more)
    path.write_bytes(pickle.dumps(content))
    return str(path)


def load(model, path):
    return DynamicCheckpointer(model).load(str(path))


@pytest.mark.parametrize('kind', ['mask', 'retinanet', 'panoptic'])
@pytest.mark.parametrize('shared', [True, False])
def test_a_zoo_file_fills_all_exits(kind, shared, tmp_path, caplog):
    plain = build(kind, dynamic=False)
    path = write_zoo_file(tmp_path / 'model.pkl', plain)
    model = build(kind, shared=shared)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with caplog.at_level('INFO'):
        load(model, path)
    state = model.state_dict()
    for key, value in plain.state_dict().items():
        rest = key.removeprefix('backbone.bottom_up.')
        names = [f'backbone.{name}.{rest}' for name in ('first', 'second')]
        if rest == key:
            names = [f'branches.{index}.{key}' for index in range(1 if shared else 2)]
        filled = [name for name in names if name in state]
        assert filled and all(torch.equal(state[name], value) for name in filled)
    assert 'a plain detector fills both exits' in caplog.text
    assert 'afresh, since missing' in caplog.text and 'router' in caplog.text
    assert not model.has_cascade


def test_the_stock_checkpointer_fills_both_exits_too(tmp_path):
    plain = build('faster', dynamic=False)
    torch.save(dict(model=plain.state_dict()), tmp_path / 'model.pth')
    model = build('faster')
    DetectionCheckpointer(model).load(str(tmp_path / 'model.pth'))
    wanted = plain.state_dict()['backbone.bottom_up.res4.0.conv1.weight']
    for name in ('first', 'second'):
        assert torch.equal(model.state_dict()[f'backbone.{name}.res4.0.conv1.weight'], wanted)


def test_a_backbone_alone_fills_both_backbones(tmp_path):
    # As those that were trained on ImageNet: names are guessed, and there is a classifier.
    plain = build('mask', dynamic=False)
    backbone = plain.backbone.bottom_up.state_dict()
    arrays = {key: value.numpy() for key, value in backbone.items()}
    arrays['stem.fc.weight'] = np.zeros((10, 256), np.float32)
    content = dict(model=arrays, __author__='torchvision', matching_heuristics=True)
    (tmp_path / 'R-50.pkl').write_bytes(pickle.dumps(content))
    model = build('mask')
    for parameter in model.parameters():
        parameter.data.fill_(7)
    load(model, tmp_path / 'R-50.pkl')
    for name in ('first', 'second'):
        net = getattr(model.backbone, name).state_dict()
        assert all(torch.equal(value, backbone[key]) for key, value in net.items())


def test_a_calibration_of_any_length_is_kept(tmp_path):
    model = build('faster')
    wake(model)
    model.difficulties = torch.linspace(0.1, 0.9, 17)
    model.latencies.copy_(torch.tensor([0.1, 0.3]))
    model.set_budget(hard_share=0.25)
    DynamicCheckpointer(model, str(tmp_path)).save('model')
    again = build('faster', options=('MODEL.DYNAMIC.BUDGET.TARGET_LATENCY', 0.2))
    load(again, tmp_path / 'model.pth')
    assert torch.equal(again.difficulties, model.difficulties) and again.has_cascade
    # The config's own budget, as soon as what it needs is loaded.
    assert (again.difficulties > again.threshold).float().mean() == pytest.approx(0.5, abs=0.04)
    for key, value in model.state_dict().items():
        if key != 'threshold':
            assert torch.allclose(again.state_dict()[key], value, equal_nan=True), key


@pytest.mark.parametrize(
    'kind, options, said',
    [
        ('faster', ('MODEL.RESNETS.DEPTH', 101), 'of another backbone'),
        ('retinanet', (), 'of other heads'),
    ],
)
def test_files_of_another_architecture_are_refused(kind, options, said, tmp_path):
    path = write_zoo_file(tmp_path / 'model.pkl', build(kind, dynamic=False, options=options))
    with pytest.raises(UsageError, match=said) as error:
        load(build('faster'), path)
    assert '\n' not in str(error.value) and 'model.pkl' in str(error.value)


def test_other_classes_are_fine_tuning(tmp_path, caplog):
    path = write_zoo_file(tmp_path / 'model.pkl', build('faster', dynamic=False))
    model = build('faster', options=('MODEL.ROI_HEADS.NUM_CLASSES', 7))
    with caplog.at_level('INFO'):
        load(model, path)
    assert (
        'since of another shape (other classes?): roi_heads.box_predictor.cls_score' in caplog.text
    )


def test_checkpoints_of_the_other_framework_are_refused(tmp_path):
    state = {'backbone.first.layer1.0.conv1.weight': torch.zeros(1), 'neck.x': torch.zeros(1)}
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'epoch_1.pth')
    with pytest.raises(UsageError, match='MMDetection.s, and one of Detectron2 is wanted: convert'):
        load(build('faster'), tmp_path / 'epoch_1.pth')
    with pytest.raises(UsageError, match='convert'):
        build('faster').load_state_dict(state, strict=False)


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ('executed',)


@pytest.mark.parametrize('name', ['model.pkl', 'model.pth'])
def test_nothing_in_a_file_is_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = dict(model=dict(weight=Evil()), __author__='x')
    if name.endswith('.pkl'):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UsageError, match='is no checkpoint that can be read safely'):
        load(build('faster'), tmp_path / name)
    assert not (tmp_path / 'executed').exists()


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UsageError, match='there is no checkpoint at'):
        load(build('faster'), tmp_path / 'none.pth')


@torch.no_grad()
def test_a_saved_detector_detects_the_same(tmp_path):
    model = build('mask', shared=False).eval()
    wake(model)
    DynamicCheckpointer(model, str(tmp_path)).save('model')
    again = build('mask', shared=False).eval()
    load(again, tmp_path / 'model.pth')
    for threshold in (1, -1):
        results = []
        for detector in (model, again):
            detector.set_budget(threshold=threshold)
            results.append(detector(images()))
        for before, after in zip(*results):
            assert torch.equal(before['instances'].scores, after['instances'].scores)


def caffe2_name(key):
    """Detectron's name of a ResNet's entry, as in the files that the zoo's trainings start from."""
    key = key.replace('stem.conv1.norm', 'res_conv1_bn').replace('stem.conv1', 'conv1')
    key = re.sub(r'res(\d)\.(\d+)\.shortcut', r'res\1_\2_branch1', key)
    key = re.sub(
        r'res(\d)\.(\d+)\.conv(\d)',
        lambda match: f'res{match[1]}_{match[2]}_branch2{" abc"[int(match[3])]}',
        key,
    )
    for theirs, ours in (
        ('.norm.weight', '_bn_s'),
        ('.norm.bias', '_bn_b'),
        ('_bn.weight', '_bn_s'),
        ('_bn.bias', '_bn_b'),
        ('.weight', '_w'),
    ):
        key = key.replace(theirs, ours)
    return key


def test_a_caffe2_backbone_fills_both_backbones(tmp_path):
    backbone = build('faster', dynamic=False).backbone.bottom_up.state_dict()
    arrays = {
        caffe2_name(key): value.numpy()
        for key, value in backbone.items()
        if not key.endswith(('running_mean', 'running_var'))
    }
    assert {'conv1_w', 'res_conv1_bn_s', 'res2_0_branch1_w', 'res5_2_branch2c_bn_b'} <= set(arrays)
    arrays |= {'fc1000_w': np.zeros((10, 256), np.float32), 'conv1_w_momentum': arrays['conv1_w']}
    (tmp_path / 'R-50.pkl').write_bytes(pickle.dumps(arrays, protocol=2))
    model = build('faster')
    for parameter in model.parameters():
        parameter.data.fill_(7)
    load(model, tmp_path / 'R-50.pkl')
    for name in ('first', 'second'):
        net = getattr(model.backbone, name).state_dict()
        assert all(
            torch.equal(value, backbone[key])
            for key, value in net.items()
            if not key.endswith(('running_mean', 'running_var'))
        )


def test_a_backbone_of_another_depth_is_refused(tmp_path):
    plain = build('faster', dynamic=False, options=('MODEL.RESNETS.WIDTH_PER_GROUP', 8))
    backbone = plain.backbone.bottom_up.state_dict()
    arrays = {caffe2_name(key): value.numpy() for key, value in backbone.items()}
    (tmp_path / 'R-50.pkl').write_bytes(pickle.dumps(arrays, protocol=2))
    with pytest.raises(UsageError, match='of another backbone'):
        load(build('faster'), tmp_path / 'R-50.pkl')


def test_a_file_without_weights(tmp_path):
    torch.save(dict(epoch=3), tmp_path / 'empty.pth')
    with pytest.raises(UsageError, match='empty.pth.*it holds no weights'):
        load(build('faster'), tmp_path / 'empty.pth')
