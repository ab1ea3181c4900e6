"""`tools/compress.py` and what loads its files: another tool, a run, mmdet's own functions."""

import re
import runpy
import sys

import pytest
import torch

from conftest import ROOT, load_small, run_tool, train
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.compression.pruning import prune_weights
from dynamicdet.compression.pruning_blocks import PruningBlock
from dynamicdet.testing import randomize
from mmdet.apis import init_detector
from mmdet.registry import MODELS


@pytest.fixture(scope='module')
def pruned(digits, tmp_path_factory):
    """(config, path of a pruned checkpoint) of a shrunk digits detector."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('pruned')
    cfg = load_small(
        'faster_rcnn_digits',
        digits,
        folder,
        True,
        **{
            'model.neck.in_channels': [8, 16, 32, 64],
            'param_scheduler': [],
            'train_cfg.max_epochs': 1,
        },
    )
    cfg.model.pop('detector')
    model = randomize(MODELS.build(cfg.model))
    prune_weights(model, [PruningBlock('all', ['*'], 0.8)])
    meta = dict(dataset_meta=cfg.metainfo.to_dict(), epoch=1, iter=3)
    write_checkpoint(
        dict(state_dict=model.state_dict(), meta=meta, optimizer={}), str(folder / 'a.pth')
    )
    cfg.dump(folder / 'config.py')
    return cfg, folder / 'a.pth'


@pytest.fixture(scope='module')
def printed(pruned):
    """What the tool says of it, with a report; it wrote a.ddz beside it."""
    path = pruned[1]
    result = run_tool(
        'compress.py', path, '--out', path.with_suffix('.ddz'), '--report', '--group', 'two-stage'
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_report_adds_up(pruned, printed):
    path = pruned[1]
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith('block'))
    rows = {line.split()[0]: line.split() for line in lines[start + 1 : start + 6]}
    assert list(rows) == ['backbone', 'proposals', 'roi_heads', '(index)', 'total']
    state = read_checkpoint(str(path))['state_dict']
    counted = sum(
        value.numel()
        for key, value in state.items()
        if 'running_' not in key and 'num_batches' not in key
    )
    assert float(rows['total'][1]) == pytest.approx(counted / 1e6, abs=5e-4)
    assert float(rows['total'][3][:-1]) == pytest.approx(80, abs=1)
    size = path.with_suffix('.ddz').stat().st_size
    assert float(rows['total'][6]) == pytest.approx(size / 1e6, abs=5e-4)
    # Every bit comes back.
    assert {row[8] for row in rows.values()} == {'0.00%'}
    assert f'{size} bytes' in printed and 'left out: optimizer' in printed
    assert size < 0.35 * path.stat().st_size


def test_it_loads_wherever_a_checkpoint_does(pruned, printed, tmp_path):
    cfg, path = pruned
    small = str(path.with_suffix('.ddz'))
    state = read_checkpoint(str(path))['state_dict']
    model = init_detector(cfg, small, device='cpu')
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert tuple(model.dataset_meta['classes']) == cfg.metainfo['classes']
    # As the start of a run that learns nothing.
    cfg = cfg.copy()
    cfg.work_dir, cfg.load_from = str(tmp_path), small
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.optim_wrapper.optimizer.update(lr=0, weight_decay=0)
    after = train(cfg).model.state_dict()
    assert all(
        torch.equal(value, state[key])
        for key, value in after.items()
        if 'running_' not in key and 'num_batches' not in key
    )
    # And once more through the tool, where nothing is lost.
    result = run_tool('compress.py', small, '--out', tmp_path / 'b.ddz')
    assert result.returncode == 0, result.stderr[-3000:]
    again = read_checkpoint(str(tmp_path / 'b.ddz'))['state_dict']
    assert all(torch.equal(value, state[key]) for key, value in again.items())


def test_test_py_takes_it(pruned, printed, tmp_path):
    path = pruned[1]
    found = []
    for checkpoint in (path, path.with_suffix('.ddz')):
        result = run_tool(
            'test.py',
            path.parent / 'config.py',
            checkpoint,
            '--no-data-check',
            '--work-dir',
            tmp_path,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(re.findall(r'coco/bbox_mAP[^:]*: [-.\d]+', result.stdout + result.stderr))
    assert found[0] == found[1] and len(found[0]) >= 6


@pytest.fixture
def run(pruned, tmp_path, monkeypatch, capsys):
    """Runs the tool in this process, from an empty folder: (status, stdout, stderr)."""

    def run_(*arguments):
        monkeypatch.setattr(sys, 'argv', ['compress.py', str(pruned[1]), *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / 'tools/compress.py'), run_name='__main__')
        return ended.value.code, *capsys.readouterr()

    return run_


def test_a_dry_run_writes_nothing(run, tmp_path):
    status, out, _ = run('--out', 'a.ddz', '--dry-run', '--int8', '--codebook', '4', 'roi_head.*')
    assert not status and re.search(r'would write a.ddz: \d+ bytes', out)
    assert re.search(r'entries: 4 codebook, \d+ int8', out)
    assert not list(tmp_path.iterdir())


def test_a_config_adds_what_the_detector_is_worth(run, pruned, tmp_path):
    config = str(pruned[1].parent / 'config.py')
    status, out, _ = run(
        '--out', 'a.ddz', '--config', config, '--binary', 'roi_head.*', '--entropy'
    )
    assert not status
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith('block'))
    assert lines[start].split()[-3:] == ['AP', 'AP50', 'latency']
    rows = {line.split()[0]: line.split() for line in lines[start + 1 : start + 7]}
    assert list(rows) == ['backbone', 'neck', 'rpn_head', 'roi_head', '(index)', 'total']
    original = lines[start + 7].split()
    assert original[0] == 'original' and original[1:6] == rows['total'][1:6]
    assert float(original[6]) == pytest.approx(pruned[1].stat().st_size / 1e6, abs=5e-4)
    for row in (original, rows['total']):
        assert row[-1] == 'ms' and float(row[-2]) > 0 and len(row) == 13
    # Of normally distributed weights the upper fifth: little is lost by their signs and mean, but
    # some.
    errors = {name: float(row[8][:-1]) for name, row in rows.items()}
    assert errors['backbone'] == errors['neck'] == 0 and 5 < errors['roi_head'] < 60
    assert 0 < errors['total'] < errors['roi_head'] and original[8] == '0.00%'
    streams = {' '.join(line.split()[:2]): line.split()[2:] for line in lines[start + 9 :]}
    assert int(streams['binary signs'][0]) > 0 and 'smaller' in streams['sparse bits']
    assert read_checkpoint(str(tmp_path / 'a.ddz'))['state_dict']


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--out', 'a.ddz', '--config', 'nothing.py'], "no config at 'nothing.py'"),
        (['--out', 'a.ddz', '--binary', 'nothing.*'], "'nothing.*' matches no weight"),
        (['--out', 'a.pth'], 'must end in .ddz'),
        (['--out', 'a.ddz', '--codebook', 'four'], "begins with a number of bits, not with 'four'"),
        (['--out', 'a.ddz', '--group', 'heads'], 'needs NAME=PATTERN'),
        (['--out', 'a.ddz', '--group', 'heads=nothing'], "'nothing' matches no entry"),
        (['--out', 'a.ddz', '--int8', 'nothing.*'], "'nothing.*' matches no weight"),
    ],
)
def test_bad_input_is_one_line(arguments, said, run, tmp_path):
    status, _, err = run(*arguments)
    assert status == 2 and said in err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert not list(tmp_path.iterdir())
