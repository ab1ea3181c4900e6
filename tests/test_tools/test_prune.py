"""`tools/prune.py` and `tools/sensitivity.py`: what they write is used like any other config and
checkpoint."""

import json
import re
import runpy
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from conftest import ROOT, load_small, run_tool
from dynamicdet import cli
from dynamicdet.checkpoints import read_checkpoint, write_checkpoint
from dynamicdet.deploy.pruned_config import parse_blocks
from dynamicdet.errors import UsageError
from dynamicdet.models import DynamicDetector
from dynamicdet.testing import randomize
from mmdet.apis import init_detector
from mmdet.registry import MODELS


@pytest.fixture(scope='module')
def dense(digits, tmp_path_factory):
    """Folder with config.py and a.pth of a shrunk dynamic detector."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp('dense')
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        folder / 'work',
        True,
        **{
            'model.backbone.base_channels': 16,
            'model.detector.neck.in_channels': [16, 32, 64, 128],
            'param_scheduler': [],
            'train_cfg.max_epochs': 1,
            'train_cfg.val_interval': 1,
        },
    )
    model = randomize(MODELS.build(cfg.model))
    meta = dict(dataset_meta=cfg.metainfo.to_dict(), epoch=3)
    write_checkpoint(
        dict(state_dict=model.state_dict(), meta=meta, optimizer={}), str(folder / 'a.pth')
    )
    cfg.dump(folder / 'config.py')
    return folder


@pytest.fixture(scope='module')
def pruned(dense):
    """Folder with small.py and small.pth, and what the tool printed."""
    result = run_tool(
        'prune.py',
        dense / 'config.py',
        dense / 'a.pth',
        '--out',
        dense / 'out',
        '--name',
        'small',
        '--block',
        'backbone=0.5',
        '--block',
        'branches=0.3',
        '--shape',
        64,
        64,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dense / 'out', result.stdout


def test_what_it_says(dense, pruned):
    folder, printed = pruned
    assert re.search(r'^backbone: \d+ of \d+ channels removed \((4|5)\d\.\d%\)$', printed, re.M)
    before, after, percent = re.search(
        r'parameters: ([\d.]+) M -> ([\d.]+) M \(([\d.]+)%\)', printed
    ).groups()
    states = [
        read_checkpoint(str(path))['state_dict'] for path in (dense / 'a.pth', folder / 'small.pth')
    ]
    counts = [
        sum(value.numel() for key, value in state.items() if 'running' not in key)
        for state in states
    ]
    assert float(after) < 0.6 * float(before) and float(percent) == pytest.approx(
        100 * counts[1] / counts[0], abs=0.5
    )
    gflops = re.findall(r'exit (\d), GFLOPs at 64 x 64: ([\d.]+) -> ([\d.]+)', printed)
    assert [row[0] for row in gflops] == ['0', '1'] and all(
        float(b) < 0.7 * float(a) for _, a, b in gflops
    )


def test_it_loads_like_any_other(pruned):
    folder, _ = pruned
    checkpoint = read_checkpoint(str(folder / 'small.pth'))
    assert 'optimizer' not in checkpoint and checkpoint['meta']['dataset_meta']['classes'][3] == '3'
    assert json.loads(json.dumps(checkpoint['meta']['channels'])) == checkpoint['meta']['channels']
    model = init_detector(str(folder / 'small.py'), str(folder / 'small.pth'), device='cpu')
    assert isinstance(model, DynamicDetector) and model.dataset_meta['classes'][3] == '3'
    # Not a number: what has not been measured yet.
    assert all(
        torch.equal(value.nan_to_num(-1), checkpoint['state_dict'][key].nan_to_num(-1))
        for key, value in model.state_dict().items()
    )
    assert model.gflops.isnan().all() and not len(model.difficulties)
    assert (
        model.backbone.first.layer4[0].conv1.out_channels
        == model.backbone.second.layer4[0].conv1.out_channels
        == 64
    )


def test_it_trains_and_tests(pruned, tmp_path):
    """One epoch from the config alone, which starts from the checkpoint; then test.py and a
    resume."""
    folder, _ = pruned
    cfg = Config.fromfile(folder / 'small.py')
    assert cfg.load_from == str(folder / 'small.pth')
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    result = run_tool(
        'test.py',
        folder / 'small.py',
        tmp_path / 'epoch_1.pth',
        '--work-dir',
        tmp_path,
        '--no-data-check',
    )
    assert result.returncode == 0 and 'bbox_mAP' in result.stdout + result.stderr, result.stderr[
        -2000:
    ]
    cfg = Config.fromfile(folder / 'small.py')
    cfg.work_dir, cfg.resume, cfg.load_from = str(tmp_path), True, str(tmp_path / 'epoch_1.pth')
    cfg.train_cfg.max_epochs = 2
    again = Runner.from_cfg(cfg)
    again.train()
    assert again.epoch == 2


def main(name, monkeypatch, *arguments):
    """A tool in this process: its status."""
    monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
    return caught.value.code


def test_dry_run_writes_nothing(dense, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'none'
    assert not main(
        'prune.py',
        monkeypatch,
        dense / 'config.py',
        dense / 'a.pth',
        '--out',
        out,
        '--dry-run',
        '--shape',
        64,
        64,
    )
    assert (
        'would write config_pruned.py and config_pruned.pth' in capsys.readouterr().out
        and not out.exists()
    )


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['--block', 'backbone=1'], 'at least 0 and below 1'),
        (['--block', 'backbone'], 'needs PATTERN,...=SHARE'),
        (['--block', 'bakbone=0.5'], "'bakbone' matches no module"),
        (['--block', 'backbone=0.01'], 'nothing would be removed'),
        (['--block', 'backbone=0.999'], 'pruned to nothing'),
        (['--exclude', '*.fc_clz'], "'*.fc_clz' matches no module"),
        (['--round-to', '0'], 'from 1 on'),
    ],
)
def test_bad_input_is_one_line(dense, tmp_path, monkeypatch, capsys, arguments, reason):
    assert (
        main(
            'prune.py',
            monkeypatch,
            dense / 'config.py',
            dense / 'a.pth',
            '--out',
            tmp_path / 'o',
            *arguments,
        )
        == 2
    )
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error:')]
    assert len(said) == 1 and reason in said[0]
    assert not list(tmp_path.rglob('*.pth'))


def test_the_wrong_checkpoint_for_a_config(dense, pruned, tmp_path):
    folder, _ = pruned
    for config, checkpoint, reason in (
        (dense / 'config.py', folder / 'small.pth', 'has lost channels'),
        (folder / 'small.py', dense / 'a.pth', 'of another shape'),
    ):
        result = run_tool('test.py', config, checkpoint, '--work-dir', tmp_path, '--no-data-check')
        said = [line for line in result.stderr.splitlines() if line.startswith('error:')]
        assert result.returncode == 2 and len(said) == 1 and reason in said[0], result.stderr[
            -2000:
        ]


def test_training_does_not_leave_what_was_removed_random(dense, pruned, tmp_path):
    """A checkpoint of a run does not say that channels are gone; its shapes do."""
    checkpoint = read_checkpoint(str(pruned[0] / 'small.pth'))
    write_checkpoint(
        dict(state_dict=checkpoint['state_dict'], meta=dict(epoch=1), optimizer={}),
        str(tmp_path / 'e.pth'),
    )
    for how in (
        ['--cfg-options', f'load_from={tmp_path / "e.pth"}'],
        ['--resume', tmp_path / 'e.pth'],
    ):
        result = run_tool(
            'train.py', dense / 'config.py', '--work-dir', tmp_path / 'w', '--no-data-check', *how
        )
        said = [line for line in result.stderr.splitlines() if line.startswith('error:')]
        assert result.returncode == 2 and len(said) == 1 and 'has lost channels' in said[0], (
            result.stderr[-2000:]
        )


def test_what_a_training_would_compress(dense, tmp_path, monkeypatch, capsys):
    cfg = Config.fromfile(dense / 'config.py')
    block = dict(name='own', modules=['backbone'], exclude=['*.conv1'], target=0.3)
    cfg.custom_hooks = [
        dict(type='PruningHook', blocks=[block], schedule='cubic', end=0, start=0),
        dict(type='WeightSharingHook', blocks=[dict(name='all', modules=['*'], bits=3)]),
        dict(type='QuantizationHook'),
    ]
    cfg.dump(tmp_path / 'config.py')
    arguments = [
        tmp_path / 'config.py',
        '--work-dir',
        tmp_path / 'w',
        '--no-data-check',
        '--dry-run',
    ]
    assert not main('train.py', monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert re.search(
        r'^prune own: 30% of the weights of \d+ layers, [\d.]+ M weights, by magnitude over the '
        r'block, '
        r'cubic, between 0 and 0 epochs$',
        said,
        re.M,
    )
    assert re.search(r'^share all: 8 values in each of \d+ layers, after 0 epochs$', said, re.M)
    assert re.search(r'^round to 8 bits, after 0 epochs: first, second, branch0', said, re.M)
    assert not list(tmp_path.rglob('*.pth'))


def test_blocks_on_the_command_line():
    (one,) = parse_blocks(['backbone,neck=0.25'], ['*.conv1'], 'block', 1)
    assert (one.name, one.modules, one.target, one.exclude) == (
        'backbone,neck',
        ['backbone', 'neck'],
        0.25,
        ('*.conv1',),
    )
    assert (one.structured, one.over, one.norm) == (True, 'block', 1)
    with pytest.raises(UsageError, match='needs PATTERN'):
        parse_blocks(['=0.5'])


def test_sensitivity_on_the_command_line(dense, tmp_path, monkeypatch, capsys):
    arguments = [
        dense / 'config.py',
        dense / 'a.pth',
        '--out',
        tmp_path / 's.json',
        '--shares',
        '0.5',
        '--images',
        '2',
        '--block',
        'router=router',
        '--size',
        '0.6',
    ]
    assert not main('sensitivity.py', monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert 'router: 50%' in printed and (tmp_path / 's.png').read_bytes().startswith(b'\x89PNG')
    assert set(json.loads((tmp_path / 's.json').read_text())['results']) == {'dense', 'router 0.5'}
    assert main('sensitivity.py', monkeypatch, *arguments[:-1], '0.2') == 2
    assert 'needs larger ones' in capsys.readouterr().err
    for options, reason in (
        (['--block', 'router=backbone'], "another block 'router', of router"),
        (['--shares', 'nan'], 'at least 0 and below 1'),
    ):
        assert main('sensitivity.py', monkeypatch, *arguments, *options) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error:')]
        assert len(said) == 1 and reason in said[0]
    before = (tmp_path / 's.json').read_bytes()
    assert not main('sensitivity.py', monkeypatch, *arguments, '--dry-run')
    assert re.search(r'^router: [\d,]+ weights$', capsys.readouterr().out, re.M)
    assert (tmp_path / 's.json').read_bytes() == before


def test_the_wildlife_config_takes_a_folder_and_nothing_else(tmp_path):
    """mmengine alone would move the name only."""
    import argparse

    args = argparse.Namespace(
        config=str(ROOT / 'configs/compression/faster_rcnn_r50_fpn_wildlife.py'),
        cfg_options=dict(data_root=str(tmp_path)),
    )
    cfg = cli.load_config(args)
    for split, name in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == f'{tmp_path}/'
        assert dataset.ann_file == f'annotations/instances_{name}.json'
        assert len(dataset.metainfo.classes) == 13 == cfg.model.roi_head.bbox_head.num_classes
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == f'{tmp_path}/annotations/instances_val.json'
    hook = next(one for one in cfg.custom_hooks if one.type == 'PruningHook')
    assert hook.blocks[0].target == 0.3 and cfg.model.backbone.style == 'caffe'
