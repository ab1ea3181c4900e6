"""Files from elsewhere are read without executing what is in them."""
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from dynamicdet.errors import UsageError
from dynamicdet.interop.reading import read_weights

ARRAYS = dict(
    plain=np.arange(6, dtype=np.float32).reshape(2, 3),
    columns=np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    big_end=np.arange(3, dtype='>f4'),
    half=np.ones(2, np.float16),
    counter=np.array(7, np.int64),
    flags=np.array([True, False]))


def refusal(path):
    with pytest.raises(UsageError) as caught:
        read_weights(str(path))
    message = str(caught.value)
    assert str(path) in message and '\n' not in message and len(message) < 400
    return message


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays(tmp_path, protocol):
    content = dict(model=OrderedDict(ARRAYS), __author__='someone', matching_heuristics=True,
                   iteration=np.float64(3))
    (tmp_path / 'zoo.pkl').write_bytes(pickle.dumps(content, protocol=protocol))
    state = read_weights(str(tmp_path / 'zoo.pkl'))
    assert state.keys() == ARRAYS.keys()
    for name, wanted in ARRAYS.items():
        assert state[name].is_contiguous()
        np.testing.assert_array_equal(state[name].numpy(), wanted)


def test_arrays_of_python_2(tmp_path):
    """Their bytes are strings, and numpy's core had one name."""
    data = np.array([1.5, -2], np.float32).tobytes()
    record = (b"(dp0\nS'model'\np1\n(dp2\nS'w'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n"
              b"(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I2\ntp10\n"
              b"cnumpy\ndtype\np11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\n"
              b"I0\ntp16\nbI00\nS" + repr(data)[1:].encode() + b"\np17\ntp18\nbss.")
    (tmp_path / 'old.pkl').write_bytes(record)
    assert read_weights(str(tmp_path / 'old.pkl'))['w'].tolist() == [1.5, -2]


@pytest.mark.parametrize('content', [
    dict(model=dict(w=torch.ones(2)), optimizer=dict(lr=1.0), iteration=9),
    dict(state_dict=OrderedDict(w=torch.ones(2)), meta=dict(epoch=12)),
    dict(w=torch.ones(2)),
], ids=['model', 'state_dict', 'bare'])
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files(tmp_path, content, zipped):
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    assert read_weights(str(tmp_path / 'x.pth'))['w'].tolist() == [1, 1]


def test_a_whole_module_gives_its_state_dict(tmp_path, monkeypatch):
    """As official YOLOv7 files hold one, whose classes are not to be had."""
    namespace = types.ModuleType('models.yolo')
    exec('from torch.nn import Module\nclass Model(Module): pass\nclass Detect(Module): pass',
         vars(namespace))
    model, detect = namespace.Model(), namespace.Detect()
    detect.register_buffer('anchors', torch.ones(3))
    detect.register_buffer('grid', torch.ones(1), persistent=False)
    model.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), detect)
    model.absent, model.yaml = None, dict(nc=80)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'models', types.ModuleType('models'))
        patch.setitem(sys.modules, 'models.yolo', namespace)
        torch.save(dict(model=model.half(), ema=None, best_fitness=np.array([0.5])), tmp_path / 'x.pt')
    before = sorted(map(str, torch.serialization.get_safe_globals()))
    state = read_weights(str(tmp_path / 'x.pt'))
    assert sorted(map(str, torch.serialization.get_safe_globals())) == before
    wanted = model.state_dict()
    assert list(state) == list(wanted) and 'model.3.anchors' in state
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert not any(value.requires_grad for value in state.values())
    # Modules alone: what they bring along is as strange as elsewhere.
    model.harm = Call(os.system, 'true')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'models', types.ModuleType('models'))
        patch.setitem(sys.modules, 'models.yolo', namespace)
        torch.save(dict(model=model), tmp_path / 'x.pt')
    assert 'system, which is no array' in refusal(tmp_path / 'x.pt')


def test_files_from_beside_numpy_1(tmp_path):
    """numpy's core had another name."""
    content = dict(model=dict(w=torch.ones(2)), best_fitness=np.array([0.5]), fitness=np.float64(0.5))
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    whole = (tmp_path / 'x.pth').read_bytes()
    assert whole.count(b'numpy._core') == 2
    (tmp_path / 'x.pth').write_bytes(whole.replace(b'numpy._core', b'numpy.core'))
    assert read_weights(str(tmp_path / 'x.pth'))['w'].tolist() == [1, 1]


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('name', ['x.pkl', 'x.pth'])
@pytest.mark.parametrize('function', [os.system, exec, subprocess.check_output, os.mkdir],
                         ids=lambda function: function.__name__)
def test_what_would_run_is_refused_and_does_not_run(tmp_path, monkeypatch, name, function):
    monkeypatch.chdir(tmp_path)
    harm = tmp_path / 'harm'
    argument = {'exec': f'open({str(harm)!r}, "w")', 'mkdir': str(harm)}.get(
        function.__name__, f'mkdir {harm}')
    arguments = (argument, ) if function is not subprocess.check_output else (['mkdir', str(harm)], )
    call = Call(function, *arguments)
    # The file does what it says, where it is trusted.
    pickle.loads(pickle.dumps(call))
    assert harm.exists()
    harm.rmdir() if harm.is_dir() else harm.unlink()
    content = dict(model=dict(w=ARRAYS['plain'] if name == 'x.pkl' else torch.ones(1), harm=call))
    if name == 'x.pkl':
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    said = refusal(tmp_path / name)
    assert f'{function.__name__}, which is no array' in said
    assert not harm.exists()


def test_classes_are_not_even_imported(tmp_path):
    assert 'antigravity' not in sys.modules
    (tmp_path / 'x.pkl').write_bytes(b'cantigravity\ngeohash\n.')
    assert 'antigravity.geohash' in refusal(tmp_path / 'x.pkl')
    assert 'antigravity' not in sys.modules


@pytest.mark.parametrize('content', [
    np.array([print], object),
    np.array([(1, 2.0)], [('a', 'i4'), ('b', 'f4')]),
    np.array(['text']),
], ids=['objects', 'records', 'text'])
def test_arrays_of_no_numbers(tmp_path, content):
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(dict(model=dict(w=content))))
    refusal(tmp_path / 'x.pkl')


def test_states_that_arrays_cannot_have(tmp_path):
    """numpy itself would be given them."""
    whole = pickle.dumps(dict(w=np.arange(100, dtype=np.float32)), protocol=2)
    for old, new in ((b'Kd\x85', b'Ke\x85'), (b'Kd\x85', b'M\xff\xff\x85'), (b'f4', b'O8')):
        assert whole.count(old) == 1
        (tmp_path / 'x.pkl').write_bytes(whole.replace(old, new))
        refusal(tmp_path / 'x.pkl')


@pytest.mark.parametrize('name', ['x.pkl', 'x.pth'])
@pytest.mark.parametrize('share', [0, 0.1, 0.5, 0.99])
def test_cut_short(tmp_path, name, share):
    path = tmp_path / name
    if name == 'x.pkl':
        path.write_bytes(pickle.dumps(dict(model=ARRAYS)))
    else:
        torch.save(dict(model=dict(w=torch.ones(1000))), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    assert 'cannot be read' in refusal(path) or 'can be read safely' in refusal(path)


@pytest.mark.parametrize('content', [[1], {}, dict(model={}), dict(model=dict(w='text')), dict(w=1),
                                     {3: torch.ones(1)}], ids=str)
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / 'x.pth')
    assert 'is no checkpoint' in refusal(tmp_path / 'x.pth')


@pytest.mark.parametrize('odd', [
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.ones(2, dtype=torch.complex64),
    lambda: torch.ones(2, device='meta'),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
], ids=['sparse', 'complex', 'meta', 'quantised'])
def test_tensors_that_are_no_plain_numbers(tmp_path, odd):
    torch.save(dict(model=dict(w=odd())), tmp_path / 'x.pth')
    assert 'no checkpoint' in refusal(tmp_path / 'x.pth')


def test_no_file(tmp_path):
    for path in (tmp_path / 'missing.pkl', tmp_path):
        assert 'there is no checkpoint' in refusal(path)
