"""The tool on small models: what it writes and says, and that it writes nothing where it
refuses."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from foreign import convert, detectron2_shapes
from mmengine.config import Config

import dynamicdet
from conftest import ROOT
from dynamicdet.cascade.weights import is_plain
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.detectron2 import DETECTRON2
from mmdet.registry import MODELS

CONFIG = ROOT / 'configs/dy_faster_rcnn_detectron2.py'
TINY = """
_base_ = '{base}'
backbone = dict(base_channels=4, init_cfg=None)
detector = dict(
    backbone=backbone,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16)))
"""


@pytest.fixture
def configs(tmp_path):
    """Small: the dynamic config, the static one, and one of another depth."""
    texts = dict(
        dynamic=TINY.format(base=CONFIG) + 'model = dict(detector=detector, backbone=backbone)',
        static=TINY.format(base='mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py')
        + 'model = detector',
        deeper=TINY.format(base=CONFIG) + 'backbone.update(depth=101)\n'
        'model = dict(detector=detector, backbone=backbone)',
        other=TINY.format(base=ROOT / 'configs/dy_faster_rcnn.py')
        + 'model = dict(detector=detector, backbone=backbone)',
    )
    for name, text in texts.items():
        (tmp_path / f'{name}.py').write_text(text)
    return {name: tmp_path / f'{name}.py' for name in texts}


@pytest.fixture
def theirs(configs):
    """A checkpoint of Detectron2's for the small models: its keys, their shapes."""
    model = MODELS.build(Config.fromfile(configs['static']).model)
    shapes, keys = model.state_dict(), list(detectron2_shapes((3, 4, 6, 3)))
    found, _ = apply_rules(
        DETECTRON2.rules(model), {key: torch.tensor(i) for i, key in enumerate(keys)}
    )
    rng = np.random.default_rng(0)
    return {
        keys[index]: rng.random(tuple(shapes[name].shape), np.float32)
        for name, index in found.items()
    }


@pytest.fixture
def source(theirs, tmp_path):
    """``source(state)``: a file of the zoo."""

    def write(state=theirs, name='model_final.pkl'):
        (tmp_path / name).write_bytes(pickle.dumps(dict(model=state, __author__='them')))
        return tmp_path / name

    return write


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The one line of a refusal; nothing was written, not even a folder."""

    def run(*arguments, family='detectron2', out=tmp_path / 'new/ours.pth'):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
        status, said, complained = convert(monkeypatch, arguments[0], family, arguments[1], out)
        assert status == 2 and not said, complained
        lines = complained.strip().splitlines()
        assert lines[-1].startswith('error: ') and complained.count('error: ') == 1, complained
        assert 'Traceback' not in complained and len(lines[-1]) < 700
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
        assert after == before and not (tmp_path / 'new').exists()
        return lines[-1]

    return run


@pytest.mark.parametrize('name', ['dynamic', 'static'])
@pytest.mark.parametrize('form', ['pkl', 'pth'])
def test_what_is_written(configs, source, theirs, tmp_path, monkeypatch, name, form):
    file, out = source(), tmp_path / 'new/ours.pth'
    if form == 'pth':
        file = tmp_path / 'model_final.pth'
        halves = {key: torch.from_numpy(value).half() for key, value in theirs.items()}
        torch.save(dict(model=halves, iteration=269999), file)
    status, said, complained = convert(monkeypatch, file, 'detectron2', configs[name], out)
    assert status == 0, complained
    checkpoint = read_checkpoint(str(out))
    assert checkpoint['meta'] == dict(
        source=dict(
            family='detectron2',
            file=file.name,
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        ),
        dynamicdet=dynamicdet.__version__,
    )
    state = checkpoint['state_dict']
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(configs[name]).model)
    built = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert all(value.dtype == built[key].dtype for key, value in state.items())
    lines = said.splitlines()
    assert lines[0] == f'{len(theirs)} of {len(theirs)} entries taken'
    assert lines[-1] == f'written to {out}'
    changed = [
        key for key in state if not torch.equal(state[key].nan_to_num(), built[key].nan_to_num())
    ]
    assert f'{len(changed)} of {len(state)} entries of the model filled' in lines
    counters = sum(key.endswith('num_batches_tracked') for key in state)
    left = {key for key in state if key not in changed and not key.endswith('num_batches_tracked')}
    connections = sum(key.startswith('backbone.connections.') for key in left)
    said_left = (
        f'num_batches_tracked ({counters})'
        if name == 'static'
        else (
            f'backbone.connections ({connections}), delta (1), difficulties (1), gflops (1), '
            f'latencies (1), num_batches_tracked ({counters}), platt_scale (1), '
            f'platt_shift (1), router (6), threshold (1)'
        )
    )
    assert lines[-2] == f'{len(left) + counters} left as built: {said_left}'
    prefixes = ['backbone.'] if name == 'static' else ['backbone.first.', 'backbone.second.']
    assert is_plain(state) == (name == 'static')
    wanted = torch.from_numpy(theirs['backbone.bottom_up.res4.5.conv2.weight'])
    for prefix in prefixes:
        torch.testing.assert_close(
            state[f'{prefix}layer3.5.conv2.weight'], wanted, atol=1e-3, rtol=0
        )
    # Each place has its own.
    assert len({value.data_ptr() for value in state.values() if value.numel()}) == sum(
        value.numel() > 0 for value in state.values()
    )


def test_what_is_left_as_built_follows_the_seed(configs, source, tmp_path, monkeypatch):
    routers = []
    for seed in (0, 0, 1):
        status, _, complained = convert(
            monkeypatch,
            source(),
            'detectron2',
            configs['dynamic'],
            tmp_path / 'x.pth',
            '--cfg-options',
            f'randomness.seed={seed}',
        )
        assert status == 0, complained
        routers.append(read_checkpoint(str(tmp_path / 'x.pth'))['state_dict']['router.fc1.weight'])
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'text', 'missing', 'folder', 'malicious'])
def test_no_checkpoint(configs, source, refusal, tmp_path, kind):
    path = source()
    whole = path.read_bytes()
    if kind in ('missing', 'folder'):
        path = tmp_path / 'missing.pkl' if kind == 'missing' else tmp_path
    elif kind == 'malicious':
        path.write_bytes(b'cos\nmkdir\n(S' + repr(str(tmp_path / 'harm')).encode() + b'\ntR.')
    else:
        path.write_bytes(
            dict(truncated=whole[: len(whole) // 2], empty=b'', text=b'no weights')[kind]
        )
    line = refusal(path, configs['dynamic'])
    assert str(path) in line
    assert kind != 'malicious' or 'os.mkdir' in line
    assert not (tmp_path / 'harm').exists()


def test_another_architecture(configs, source, theirs, refusal):
    deeper = refusal(source(), configs['deeper'])
    assert "model_final.pkl' from detectron2 is not converted" in deeper
    assert '510 missing (such as backbone.first.layer3.6.conv1.weight' in deeper
    shallower = refusal(
        source({**theirs, 'backbone.bottom_up.res4.6.conv1.weight': np.ones(1)}), configs['dynamic']
    )
    assert '1 unknown (such as backbone.layer3.6.conv1.weight)' in shallower
    fewer = {key: value[:5] if 'cls_score' in key else value for key, value in theirs.items()}
    assert '2 of another shape (such as branches.0.roi_head.bbox_head.fc_cls' in refusal(
        source(fewer), configs['dynamic']
    )
    theirs.pop('backbone.fpn_output2.bias')
    assert '1 missing (such as branches.0.neck.fpn_convs.0.conv.bias)' in refusal(
        source(theirs), configs['dynamic']
    )


def test_another_source(configs, source, theirs, refusal):
    count = len(theirs)
    line = refusal(source(), configs['dynamic'], family='cbnetv2')
    assert f'{count} of its {count} entries are unknown' in line and 'is --from right?' in line
    extra = refusal(source({**theirs, 'roi_heads.keypoint_head.w': np.ones(1)}), configs['dynamic'])
    assert f'1 of its {count + 1} entries are unknown' in extra and 'keypoint_head' in extra


def test_wrong_configs(configs, source, refusal, tmp_path):
    assert 'differs in bgr_to_rgb, mean, std, style' in refusal(source(), configs['other'])
    assert "no config at 'nowhere.py'" in refusal(source(), 'nowhere.py')
    assert 'no config at' in refusal(source(), 'mmdet::no/such.py')
    (tmp_path / 'empty.py').write_text('x = 1')
    assert 'has no model' in refusal(source(), tmp_path / 'empty.py')
    (tmp_path / 'odd.py').write_text("model = dict(type='RetinaNet', nosuch=1)")
    assert 'cannot be built' in refusal(source(), tmp_path / 'odd.py')


def test_places_that_cannot_be_written(configs, source, refusal, tmp_path):
    path = source()
    assert 'would overwrite' in refusal(path, configs['dynamic'], out=path)
    assert 'is a folder' in refusal(path, configs['dynamic'], out=tmp_path)


def test_a_write_that_fails_leaves_what_was_there(configs, source, tmp_path, monkeypatch):
    (tmp_path / 'ours.pth').write_text('before')
    listed = sorted(os.listdir(tmp_path)) + ['model_final.pkl']

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises((OSError, BufferError)):
        convert(monkeypatch, source(), 'detectron2', configs['dynamic'], tmp_path / 'ours.pth')
    assert (tmp_path / 'ours.pth').read_text() == 'before'
    assert sorted(os.listdir(tmp_path)) == sorted(listed)


def test_sources_are_named(configs, source, tmp_path, monkeypatch):
    status, _, complained = convert(
        monkeypatch, source(), 'elsewhere', configs['dynamic'], tmp_path / 'x'
    )
    assert (
        status == 2 and "invalid choice: 'elsewhere'" in complained and 'detectron2' in complained
    )
