"""Files from elsewhere are read without executing what is in them."""

import argparse
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from dynamicdet.errors import UsageError
from dynamicdet.exchange.reading import read_weights

ARRAYS = dict(
    plain=np.arange(6, dtype=np.float32).reshape(2, 3),
    columns=np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    big_end=np.arange(3, dtype='>f4'),
    half=np.ones(2, np.float16),
    counter=np.array(7, np.int64),
    flags=np.array([True, False]),
)


def refusal(path):
    with pytest.raises(UsageError) as caught:
        read_weights(str(path))
    message = str(caught.value)
    assert str(path) in message and '\n' not in message and len(message) < 400
    return message


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays(tmp_path, protocol):
    content = dict(
        model=OrderedDict(ARRAYS),
        __author__='someone',
        matching_heuristics=True,
        iteration=np.float64(3),
    )
    (tmp_path / 'zoo.pkl').write_bytes(pickle.dumps(content, protocol=protocol))
    state = read_weights(str(tmp_path / 'zoo.pkl'))
    assert state.keys() == ARRAYS.keys()
    for name, wanted in ARRAYS.items():
        assert state[name].is_contiguous()
        np.testing.assert_array_equal(state[name].numpy(), wanted)


def test_arrays_of_python_2(tmp_path):
    """Their bytes are strings, and numpy's core had one name."""
    data = np.array([1.5, -2], np.float32).tobytes()
    record = (
        b"(dp0\nS'model'\np1\n(dp2\nS'w'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n"
        b"(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I2\ntp10\n"
        b"cnumpy\ndtype\np11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\n"
        b'I0\ntp16\nbI00\nS' + repr(data)[1:].encode() + b'\np17\ntp18\nbss.'
    )
    (tmp_path / 'old.pkl').write_bytes(record)
    assert read_weights(str(tmp_path / 'old.pkl'))['w'].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    'content',
    [
        dict(model=dict(w=torch.ones(2)), optimizer=dict(lr=1.0), iteration=9),
        dict(state_dict=OrderedDict(w=torch.ones(2)), meta=dict(epoch=12)),
        dict(w=torch.ones(2)),
    ],
    ids=['model', 'state_dict', 'bare'],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files(tmp_path, content, zipped):
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    assert read_weights(str(tmp_path / 'x.pth'))['w'].tolist() == [1, 1]


def test_a_whole_module_gives_its_state_dict(tmp_path, monkeypatch):
    """As official YOLOv7 files hold one, whose classes are not to be had."""
    namespace = types.ModuleType('models.yolo')
    exec(
        'from torch.nn import Module\nclass Model(Module): pass\nclass Detect(Module): pass',
        vars(namespace),
    )
    model, detect = namespace.Model(), namespace.Detect()
    detect.register_buffer('anchors', torch.ones(3))
    detect.register_buffer('grid', torch.ones(1), persistent=False)
    model.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), detect)
    model.absent, model.yaml = None, dict(nc=80)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'models', types.ModuleType('models'))
        patch.setitem(sys.modules, 'models.yolo', namespace)
        torch.save(
            dict(model=model.half(), ema=None, best_fitness=np.array([0.5])), tmp_path / 'x.pt'
        )
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
    content = dict(
        model=dict(w=torch.ones(2)), best_fitness=np.array([0.5]), fitness=np.float64(0.5)
    )
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    whole = (tmp_path / 'x.pth').read_bytes()
    assert whole.count(b'numpy._core') == 2
    (tmp_path / 'x.pth').write_bytes(whole.replace(b'numpy._core', b'numpy.core'))
    assert read_weights(str(tmp_path / 'x.pth'))['w'].tolist() == [1, 1]


class Settings(argparse.Namespace):
    """A settings object of a training script, that others do not have."""


class Mapping(dict):
    """As easydict's and yacs's."""


class Sequence(list):
    pass


class Size(enum.Enum):
    SMALL = 1


class ByName(enum.Enum):
    """As Python 3.12 pickles some."""

    SMALL = 1

    def __reduce_ex__(self, protocol):
        return getattr, (type(self), self.name)


@dataclasses.dataclass(frozen=True)
class Options:
    rate: float = 0.01


@dataclasses.dataclass
class Slotted:
    __slots__ = ('rate',)
    rate: float


class WindowsPath:
    """As another system writes it."""

    def __reduce__(self):
        return pathlib.WindowsPath, ('data', 'hyps')


#: What users' files hold beside the weights.
HARMLESS = dict(
    path=pathlib.PosixPath('data/hyps'),
    windows=WindowsPath(),
    pure=pathlib.PurePosixPath('a'),
    namespace=argparse.Namespace(lr=0.1, paths=[pathlib.Path('a')]),
    date=datetime.datetime.now(),
    zone=datetime.UTC,
    span=datetime.timedelta(1),
    scalar=np.float64(0.3),
    half=np.float16(1),
    counter=np.uint8(3),
    text=np.str_('a'),
    day=np.datetime64('2024-01-01'),
    objects=np.array([{}, None], object),
    texts=np.array(['a']),
    records=np.zeros(1, [('a', 'i4')]),
    table=np.ones((2, 3)),
    order=OrderedDict(a=1),
    size=torch.Size([1, 2]),
    dtype=torch.float16,
    device=torch.device('cpu'),
    member=Size.SMALL,
    named=ByName.SMALL,
    options=Options(),
    slotted=Slotted(1.0),
    settings=Settings(lr=1),
    mapping=Mapping(a=Mapping(b=1)),
    sequence=Sequence([1, 2]),
    defaults=defaultdict(list, a=[1]),
    queue=deque([1, 2], maxlen=3),
    empty=deque(),
    count=Counter('aab'),
    sets=({1}, frozenset({2})),
    number=decimal.Decimal('0.1'),
    share=fractions.Fraction(1, 3),
    id=uuid.UUID(int=5),
    simple=types.SimpleNamespace(a=1),
    piece=slice(1, 2),
    numbers=range(3),
    bytes=b'a\xff',
    partial=functools.partial(int, base=2),
    pattern=re.compile('a+'),
    complex=1j,
    a_class=Options,
    long=1 << 1000,
)


def save_without_its_classes(content, path, monkeypatch, pickled=False):
    """Save a file with objects of a package that is not there when it is read."""
    absent = types.ModuleType('absent_package.settings')
    own = (Settings, Mapping, Sequence, Size, ByName, Options, Slotted)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'absent_package', types.ModuleType('absent_package'))
        patch.setitem(sys.modules, 'absent_package.settings', absent)
        for kind in own:
            patch.setattr(kind, '__module__', absent.__name__)
            setattr(absent, kind.__name__, kind)
        if pickled:
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)


@pytest.mark.parametrize('name', HARMLESS)
def test_harmless_objects_beside_the_weights(tmp_path, monkeypatch, name):
    """In torch's files and in those of arrays; as a training leaves its options, its best figure,
    its settings."""
    content = dict(
        epoch=-1,
        opt=dict(odd=HARMLESS[name], more=[HARMLESS[name]]),
        optimizer={'state': HARMLESS[name]},
    )
    save_without_its_classes(
        dict(content, model=dict(w=torch.ones(2))), tmp_path / 'x.pt', monkeypatch
    )
    assert read_weights(str(tmp_path / 'x.pt'))['w'].tolist() == [1, 1]
    if name not in ('size', 'dtype', 'device'):
        save_without_its_classes(
            dict(content, model=dict(w=np.ones(2))), tmp_path / 'x.pkl', monkeypatch, True
        )
        assert read_weights(str(tmp_path / 'x.pkl'))['w'].tolist() == [1, 1]


def test_all_of_them_at_once_before_zip_archives(tmp_path, monkeypatch):
    content = dict(HARMLESS, model=dict(w=torch.ones(2)))
    save_without_its_classes(content, tmp_path / 'zip.pt', monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, 'save', functools.partial(torch.save, _use_new_zipfile_serialization=False)
        )
        save_without_its_classes(content, tmp_path / 'old.pt', monkeypatch)
    for name in ('zip.pt', 'old.pt'):
        assert read_weights(str(tmp_path / name))['w'].tolist() == [1, 1]


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('name', ['x.pkl', 'x.pth'])
@pytest.mark.parametrize(
    'function',
    [os.system, exec, subprocess.check_output, os.mkdir],
    ids=lambda function: function.__name__,
)
def test_what_would_run_is_refused_and_does_not_run(tmp_path, monkeypatch, name, function):
    monkeypatch.chdir(tmp_path)
    harm = tmp_path / 'harm'
    argument = {'exec': f'open({str(harm)!r}, "w")', 'mkdir': str(harm)}.get(
        function.__name__, f'mkdir {harm}'
    )
    arguments = (argument,) if function is not subprocess.check_output else (['mkdir', str(harm)],)
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


def write_pickle(path, record):
    """A pickle, written by hand, as a file of arrays or as what torch would unpickle; its stop and
    protocol are added."""
    record = b'\x80\x02' + record + b'.'
    if path.suffix == '.pkl':
        path.write_bytes(record)
        return
    torch.save(dict(model=dict(w=torch.ones(1))), path)
    with zipfile.ZipFile(path) as archive:
        files = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for one, content in files.items():
            archive.writestr(one, record if one.endswith('data.pkl') else content)


def reduced(name, *arguments):
    """The call of a function, in pickle's operators."""
    return b'c' + name.encode().replace(b' ', b'\n') + b'\n(' + b''.join(arguments) + b'tR'


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


@pytest.mark.parametrize('name', ['x.pkl', 'x.pth'])
@pytest.mark.parametrize(
    'attack',
    [
        lambda code: reduced('builtins eval', text(code)),
        lambda code: reduced('__builtin__ eval', text(code)),
        # By way of what is let through.
        lambda code: (
            reduced('builtins getattr', b'cbuiltins\nobject\n', text('__subclasses__')) + b'(tR'
        ),
        lambda code: (
            reduced('builtins getattr', b'cabsent\nThing\n', text('__init_subclass__'))
            + b'('
            + text(code)
            + b'tR'
        ),
        lambda code: reduced(
            'builtins getattr',
            b'cmmengine.logging.history_buffer\nHistoryBuffer\n',
            text('__init__'),
        ),
        lambda code: reduced('builtins getattr', b'cbuiltins\n__import__\n', text('__call__')),
        lambda code: reduced('functools partial', b'cbuiltins\nexec\n', text(code)) + b'(tR',
        lambda code: reduced('functools partial', reduced('absent Thing'), text(code)) + b'(tR',
        # A state that replaces how states are taken.
        lambda code: (
            reduced('absent Thing')
            + b'}'
            + text('__setstate__')
            + b'cbuiltins\neval\nsb'
            + text(code)
            + b'b'
        ),
        lambda code: (
            b'cabsent\nThing\nN}'
            + text('__setstate__')
            + b'cabsent\nOther\ns\x86b'
            + text(code)
            + b'b'
        ),
        # Functions of packages that are there.
        lambda code: reduced('numpy.testing._private.utils runstring', text(code), b'}'),
        lambda code: reduced('numpy load', text('x'), b'N\x88'),
        lambda code: reduced('torch load', text('x')),
        lambda code: reduced('torch.utils.collect_env run', text(code)),
        lambda code: reduced('mmengine.config.Config fromstring', text(code), text('.py')),
        lambda code: reduced('dynamicdet.checkpoints os.system', text(code)),
        lambda code: reduced('pathlib os.system', text(code)),
        lambda code: reduced('pathlib Path.touch', reduced('pathlib Path', text('harm'))),
        lambda code: reduced('logging sys.modules', text(code)),
        lambda code: reduced('runpy run_path', text('x')),
    ],
    ids=range(20),
)
def test_attacks_are_refused_or_do_nothing(tmp_path, monkeypatch, name, attack):
    """Where the object is beside the weights, and where it is among them."""
    monkeypatch.chdir(tmp_path)
    record = attack('open("harm", "w")')
    if name == 'x.pkl':
        weight = pickle.dumps(np.ones(1), protocol=2)[2:-1]
    else:
        weight = reduced('torch FloatTensor')
    seen = set(sys.modules)
    for content in (
        b'}(' + text('odd') + record + text('model') + b'}' + text('w') + weight + b'su',
        b'}' + text('model') + b'}' + text('w') + record + b'ss',
        record,
    ):
        write_pickle(tmp_path / name, content)
        with contextlib.suppress(UsageError):
            assert list(read_weights(str(tmp_path / name))) == ['w']
            assert content.startswith(b'}(')
    assert os.listdir(tmp_path) == [name]
    assert not {'absent', 'runpy', 'antigravity'} & (set(sys.modules) - seen)


def test_a_whole_module_of_another_package(tmp_path, monkeypatch):
    """Of which no class is there when it is read; and what counts the averages is none."""
    module = types.ModuleType('absent_package.tasks')
    exec(
        'from torch.nn import Module\nclass Model(Module): pass\nclass Averages: pass', vars(module)
    )
    model, averages = module.Model(), module.Averages()
    model.layers, averages.ema = nn.Sequential(nn.Conv2d(1, 2, 1)), 3
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'absent_package', types.ModuleType('absent_package'))
        patch.setitem(sys.modules, 'absent_package.tasks', module)
        torch.save(dict(model=model, ema=averages), tmp_path / 'x.pt')
        torch.save(
            dict(model=model, ema=None), tmp_path / 'old.pt', _use_new_zipfile_serialization=False
        )
    assert list(read_weights(str(tmp_path / 'x.pt'))) == list(model.state_dict())
    assert 'as torch before 1.6 wrote it' in refusal(tmp_path / 'old.pt')


def test_classes_are_not_even_imported(tmp_path):
    assert 'antigravity' not in sys.modules
    (tmp_path / 'x.pkl').write_bytes(b'cantigravity\ngeohash\n.')
    assert 'antigravity.geohash' in refusal(tmp_path / 'x.pkl')
    assert 'antigravity' not in sys.modules


@pytest.mark.parametrize(
    'content',
    [
        np.array([print], object),
        np.array([(1, 2.0)], [('a', 'i4'), ('b', 'f4')]),
        np.array(['text']),
    ],
    ids=['objects', 'records', 'text'],
)
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
    path.write_bytes(whole[: int(share * len(whole))])
    assert 'cannot be read' in refusal(path) or 'can be read safely' in refusal(path)


@pytest.mark.parametrize(
    'content',
    [[1], {}, dict(model={}), dict(model=dict(w='text')), dict(w=1), {3: torch.ones(1)}],
    ids=str,
)
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / 'x.pth')
    assert 'is no checkpoint' in refusal(tmp_path / 'x.pth')


@pytest.mark.parametrize(
    'odd',
    [
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.ones(2, device='meta'),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=['sparse', 'complex', 'meta', 'quantized'],
)
def test_tensors_that_are_no_plain_numbers(tmp_path, odd):
    torch.save(dict(model=dict(w=odd())), tmp_path / 'x.pth')
    assert 'no checkpoint' in refusal(tmp_path / 'x.pth')


def test_no_file(tmp_path):
    for path in (tmp_path / 'missing.pkl', tmp_path):
        assert 'there is no checkpoint' in refusal(path)
