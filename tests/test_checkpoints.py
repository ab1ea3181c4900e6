import argparse
import collections
import datetime
import enum
import functools
import http.server
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from torch import nn

import dynamicdet
from dynamicdet.cascade.weights import exits_digest, fit_weights, require_complete
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.testing import tiny_detector, tiny_dynamic
from mmdet.registry import MODELS


class Line(BaseModel):
    """The least that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.norm(self.linear(torch.stack(list(inputs)))).square().mean())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The checkpoint of a short training by mmengine's Runner."""
    work_dir = tmp_path_factory.mktemp('run')
    runner = Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=lambda batch: dict(inputs=batch),
            dataset=list(torch.randn(12, 2)),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        default_scope='mmdet',
        experiment_name='line',
        randomness=dict(seed=0),
    )
    runner.train()
    return work_dir / 'epoch_2.pth'


def refusal(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and '\n' not in message
    return message


def test_a_runners_checkpoint(trained):
    checkpoint = read_checkpoint(str(trained))
    assert {'meta', 'state_dict', 'message_hub', 'optimizer', 'param_schedulers'} <= set(checkpoint)
    scalars = checkpoint['message_hub']['log_scalars']
    assert isinstance(scalars['train/loss'], HistoryBuffer)
    assert np.isfinite(scalars['train/loss'].mean())
    assert checkpoint['meta']['epoch'] == 2
    assert checkpoint['optimizer']['state'][0]['momentum_buffer'].shape == (1, 2)
    require_complete(Line(), checkpoint['state_dict'])


def test_numpy_values_are_read(tmp_path):
    values = [np.float64(1.5), np.float32(2.5), np.int64(3), np.int32(4), np.bool_(True)]
    write_checkpoint(
        dict(state_dict=dict(a=torch.ones(1)), meta=dict(values=values)), str(tmp_path / 'a.pth')
    )
    assert read_checkpoint(str(tmp_path / 'a.pth'))['meta']['values'] == values


def test_a_bare_state_dict(tmp_path):
    torch.save(Line().state_dict(), tmp_path / 'a.pth')
    checkpoint = read_checkpoint(str(tmp_path / 'a.pth'))
    assert set(checkpoint) == {'state_dict'}
    require_complete(Line(), checkpoint['state_dict'])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


@pytest.mark.parametrize(
    'save',
    [
        lambda value, path: torch.save(value, path),
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ],
    ids=['zip', 'legacy', 'pickle'],
)
def test_nothing_in_a_checkpoint_runs(tmp_path, save):
    marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
    save(dict(state_dict=dict(a=torch.ones(1)), meta=Evil(marker)), path)
    message = refusal(read_checkpoint, str(path))
    assert str(path) in message and 'safely' in message
    assert not marker.exists()
    # The trap works: the same object, unpickled as pickle does it.
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


def test_nothing_in_a_download_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    marker = tmp_path / 'marker'
    torch.save(dict(state_dict=dict(a=torch.ones(1)), meta=Evil(marker)), tmp_path / 'evil.pth')
    write_checkpoint(dict(state_dict=dict(a=torch.ones(1))), str(tmp_path / 'good.pth'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        assert read_checkpoint(f'{url}/good.pth')['state_dict']['a'] == 1
        refusal(read_checkpoint, f'{url}/evil.pth')
        refusal(read_checkpoint, f'{url}/none.pth')
        server.shutdown()
    assert not marker.exists()


def write_truncated(path):
    torch.save(dict(state_dict=Line().state_dict()), path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    'write',
    [
        lambda path: path.write_text('This is no checkpoint.\nNor is this.\n'),
        lambda path: path.write_bytes(b''),
        write_truncated,
        lambda path: path.write_bytes(pickle.dumps([1, 2, 3])),
        lambda path: path.write_bytes(pickle.dumps(dict(a=1))),
        lambda path: torch.save([1, 2, 3], path),
        lambda path: torch.save({}, path),
        lambda path: torch.save(dict(state_dict=dict()), path),
        lambda path: torch.save(dict(state_dict=[1, 2]), path),
        lambda path: torch.save(dict(state_dict=None), path),
        lambda path: torch.save(dict(state_dict=dict(a=1)), path),
        lambda path: torch.save(torch.ones(3), path),
        lambda path: path.mkdir(),
    ],
    ids=[
        'text',
        'empty',
        'truncated',
        'pickled list',
        'pickled dict',
        'list',
        'empty dict',
        'empty state',
        'state is a list',
        'state is None',
        'state of numbers',
        'tensor',
        'folder',
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, write):
    path = tmp_path / 'a.pth'
    write(path)
    assert str(path) in refusal(read_checkpoint, str(path))


def test_what_a_reader_says_in_numbers_alone_has_its_name(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text('hello')
    assert re.search('read safely: .*[A-Za-z]', refusal(read_checkpoint, str(path)))


def test_what_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    with socket.socket() as bound:
        # Nobody listens there.
        bound.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{bound.getsockname()[1]}/a.pth'
        message = refusal(read_checkpoint, url)
    assert url in message and 'give the path of a file' in message
    assert 'read safely' not in message


def test_a_missing_path(tmp_path):
    assert 'there is no checkpoint at' in refusal(read_checkpoint, str(tmp_path / 'none.pth'))


def test_another_architecture(trained):
    state = read_checkpoint(str(trained))['state_dict']
    other = nn.ModuleDict(dict(linear=nn.Linear(3, 1), head=nn.Linear(2, 2)))
    message = refusal(require_complete, other, state)
    assert '2 missing (such as head.weight, head.bias)' in message
    assert '5 unknown (such as norm.weight, norm.bias, norm.running_mean)' in message
    assert '1 of another shape (such as linear.weight)' in message


def test_what_is_excused():
    model = Line()
    state = {f'module.{key}': value for key, value in model.state_dict().items()}
    require_complete(model, state)
    state.pop('module.norm.num_batches_tracked')
    require_complete(model, state)
    state.pop('module.linear.bias')
    assert '1 missing (such as linear.bias)' in refusal(require_complete, model, state)
    require_complete(model, state, ('linear.',))


def test_write_makes_folders_and_leaves_no_litter(tmp_path):
    path = tmp_path / 'new' / 'a.pth'
    for value in (1.0, 2.0):
        write_checkpoint(dict(state_dict=dict(a=torch.tensor([value]))), str(path))
        assert read_checkpoint(str(path))['state_dict']['a'] == value
    assert [file.name for file in path.parent.iterdir()] == ['a.pth']
    # As readable as the user's other files.
    (tmp_path / 'other').write_text('')
    assert path.stat().st_mode == (tmp_path / 'other').stat().st_mode


# Writes without end. The two files are imported alone: the package would bring in mmdet, which
# takes seconds. What is run is theirs, unchanged.
_WRITER = """
import importlib.util, sys, types
root, path = sys.argv[1:]
for name in ('dynamicdet', 'dynamicdet.engine'):
    package = types.ModuleType(name)
    package.__path__ = [root + name[len('dynamicdet'):].replace('.', '/')]
    sys.modules[name] = package
from dynamicdet.engine.atomic_backend import write_atomically
sys.modules['dynamicdet.engine'].write_atomically = write_atomically
from dynamicdet.checkpoints import write_checkpoint
import torch
step = 0
while True:
    write_checkpoint(dict(state_dict=dict(a=torch.full((500_000, ), float(step)))), path)
    step += 1
    print(step, flush=True)
"""


def test_a_kill_never_leaves_half_a_file(tmp_path):
    path = tmp_path / 'a.pth'
    package = str(Path(dynamicdet.__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', _WRITER, package, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        # Killed one by one, at moments that a seed draws; while others write the same name too.
        for process in processes:
            assert process.stdout.readline() == '1\n'
        moments = np.random.default_rng(0).uniform(0.05, 0.3, len(processes))
        for process, moment in zip(processes, moments):
            for _ in range(10):
                time.sleep(moment / 10)
                values = read_checkpoint(str(path))['state_dict']['a']
                assert len(values) == 500_000 and (values == values[0]).all()
            process.kill()  # SIGKILL
            assert process.wait() == -9
            values = read_checkpoint(str(path))['state_dict']['a']
            assert len(values) == 500_000 and (values == values[0]).all()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_harmless_objects_beside_the_weights(tmp_path):
    """A training's settings stop no reading, by this package or by mmengine's Runner, and come out
    as text."""
    absent = types.ModuleType('absent_package')
    absent.Settings = type('Settings', (argparse.Namespace,), dict(__module__='absent_package'))
    absent.Stage = enum.Enum('Stage', dict(LAST=1), module='absent_package')
    odd = dict(
        path=Path('work_dirs') / 'a',
        settings=absent.Settings(lr=0.1),
        stage=absent.Stage.LAST,
        objects=np.array([dict(a=1)], object),
        steps=collections.defaultdict(list, a=[1]),
        last=collections.deque([1, 2]),
        when=datetime.datetime.now(),
        pair=(Path('a'), 1),
        same=[],
    )
    odd['same'].append(odd['same'])
    sys.modules['absent_package'] = absent
    try:
        torch.save(
            dict(state_dict=Line().state_dict(), meta=odd, optimizer=dict(state=Path('b'))),
            tmp_path / 'a.pth',
        )
    finally:
        del sys.modules['absent_package']
    checkpoint = read_checkpoint(str(tmp_path / 'a.pth'))
    require_complete(Line(), checkpoint['state_dict'])
    meta = checkpoint['meta']
    assert meta['path'] == '<pathlib.PosixPath>' and meta['settings'] == '<absent_package.Settings>'
    assert (
        meta['steps'] == dict(a=[1])
        and meta['last'] == [1, 2]
        and meta['pair'] == ('<pathlib.PosixPath>', 1)
    )
    assert meta['same'][0] is meta['same'] and list(meta) == list(odd)
    write_checkpoint(checkpoint, str(tmp_path / 'b.pth'))
    assert read_checkpoint(str(tmp_path / 'b.pth'))['meta']['stage'] == meta['stage']
    model = Line()
    load_checkpoint(model, str(tmp_path / 'a.pth'))
    assert torch.equal(model.linear.weight, checkpoint['state_dict']['linear.weight'])


def test_arrays_are_written_as_they_came(tmp_path):
    """Arrays that were read are numpy's own for whoever reads what is written next, the package
    there or not."""
    log = HistoryBuffer([1.0, 2.0], [1, 1])
    write_checkpoint(
        dict(state_dict=dict(a=torch.ones(1)), message_hub=dict(log=log)), str(tmp_path / 'a.pth')
    )
    write_checkpoint(read_checkpoint(str(tmp_path / 'a.pth')), str(tmp_path / 'b.pth'))
    a, b = (zipfile.ZipFile(tmp_path / f'{name}.pth').read('archive/data.pkl') for name in 'ab')
    assert b'dynamicdet' not in b and a == b
    again = read_checkpoint(str(tmp_path / 'b.pth'))['message_hub']['log']
    again.update(3.0)
    assert again.mean() == 2 and again.data[0].tolist() == [1, 2, 3]


# Weights to start from.


def plain_weights(**changes):
    """A plain detector's weights for `tiny_dynamic('fcos')`."""
    torch.manual_seed(1)
    state = MODELS.build(tiny_detector('fcos')).state_dict()
    return {**state, **changes}


def test_weights_of_other_classes_fill_both_exits_in_one_line(caplog):
    model = MODELS.build(tiny_dynamic('fcos', shared=False))
    state = plain_weights(
        **{
            'bbox_head.conv_cls.weight': torch.zeros(7, 64, 3, 3),
            'bbox_head.conv_cls.bias': torch.zeros(7),
        }
    )
    fresh = {key: value.clone() for key, value in model.state_dict().items() if 'conv_cls' in key}
    fitted, line = fit_weights(model, state)
    assert 'a plain detector fills both exits' in line and '\n' not in line
    assert line.count('bbox_head.conv_cls') == 1 and 'other classes' in line
    assert 'backbone.connections' in line and 'router' in line and 'not used' not in line
    loaded = model.load_state_dict(fitted, strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for exit in (0, 1):
        kept = model.branches[exit].bbox_head
        assert torch.equal(
            kept.conv_cls.weight, fresh[f'branches.{exit}.bbox_head.conv_cls.weight']
        )
        assert torch.equal(kept.conv_reg.weight, state['bbox_head.conv_reg.weight'])


def test_entries_that_match_nothing_are_named_and_left_to_the_loader():
    model = MODELS.build(tiny_dynamic('fcos'))
    fitted, line = fit_weights(model, plain_weights(**{'mask_head.conv.weight': torch.zeros(1)}))
    assert 'not used: mask_head.conv' in line
    # A layer may know old names: its own entries must not be taken for the loaded ones.
    assert 'mask_head.conv.weight' in fitted and not any(
        key.startswith('router.') for key in fitted
    )


def test_a_dynamic_detectors_weights_are_taken_whole():
    model = MODELS.build(tiny_dynamic('fcos'))
    fitted, line = fit_weights(
        model, {f'module.{key}': value for key, value in model.state_dict().items()}
    )
    assert line.startswith('a checkpoint fills the detector, ') and ';' not in line
    assert fitted.keys() == model.state_dict().keys()


def test_the_digest_is_of_the_weights_that_detect():
    model = MODELS.build(tiny_dynamic('fcos'))
    state = model.state_dict()
    router = dict(
        state, delta=torch.tensor(1.0), threshold=torch.tensor(0.2), difficulties=torch.ones(9)
    )
    router['router.fc1.weight'] = router['router.fc1.weight'] + 1
    wrapped = {f'module.{key}': value for key, value in reversed(router.items())}
    assert exits_digest(wrapped) == exits_digest(state)
    key = next(key for key in state if key.startswith('backbone.second'))
    assert exits_digest({**state, key: state[key] + 1e-3}) != exits_digest(state)
