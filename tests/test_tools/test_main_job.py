"""From a data set to a detector at any speed, by the command lines that the README shows."""

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmdet
from conftest import ROOT, run_tool, shrink_options
from dynamicdet.checkpoints import read_checkpoint

STEP_1 = ROOT / 'configs/dy_faster_rcnn_digits.py'
STEP_2 = ROOT / 'configs/dy_faster_rcnn_digits_router.py'
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim/tools'
CALIBRATION = ('difficulties', 'gflops', 'latencies', 'threshold')


def options(digits, **more):
    settings = {**shrink_options(digits), 'train_cfg.max_epochs': 1, **more}
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


def succeed(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert 'Traceback' not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope='session')
def job(digits, tmp_path_factory):
    """Both steps and the calibration, one after the other in one folder, and what they said."""
    folder = tmp_path_factory.mktemp('job with spaces')
    # Weights that find something after one epoch, and routers that tell images apart.
    fast = {'optim_wrapper.optimizer.lr': 2e-3, 'param_scheduler': '[]'}
    work_dirs = [folder / 'work_dirs' / config.stem for config in (STEP_1, STEP_2)]
    said = [
        succeed(
            run_tool(
                'train.py',
                STEP_1,
                cwd=folder,
                *options(
                    digits, **fast, **{'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 4}
                ),
            )
        ),
        succeed(
            run_tool(
                'train.py',
                STEP_2,
                cwd=folder,
                *options(digits, **fast, **{'optim_wrapper.accumulative_counts': 1}),
            )
        ),
        succeed(
            run_tool(
                'calibrate.py',
                STEP_2,
                work_dirs[1] / 'epoch_1.pth',
                '--out',
                'calibrated.pth',
                cwd=folder,
                *options(digits),
            )
        ),
    ]
    return SimpleNamespace(
        folder=folder,
        said=said,
        cascade=work_dirs[0] / 'epoch_4.pth',
        router=work_dirs[1] / 'epoch_1.pth',
        calibrated=folder / 'calibrated.pth',
    )


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """``inside(tool, *arguments)`` runs a tool in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # mmdet's tools set it.
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
        try:
            runpy.run_path(str(tool), run_name='__main__')
        except SystemExit as ended:
            assert not ended.code

    return run


def results(path):
    """Predictions as tools/test.py writes them."""
    with open(path, 'rb') as file:
        found = pickle.load(file)
    assert len(found) == 6
    return found


def exits(path):
    return [entry['exit'] for entry in results(path)]


# Training.


def test_step_1_trains_and_evaluates(job):
    assert 'exit0.' in job.said[0] and 'exit1.' in job.said[0]
    assert 'coco/bbox_mAP' in job.said[0]
    assert job.cascade.is_file()


def test_step_2_starts_from_step_1_and_changes_the_router_alone(job):
    assert 'work_dirs/dy_faster_rcnn_digits/epoch_4.pth' in job.said[1]
    before, after = (read_checkpoint(str(path))['state_dict'] for path in (job.cascade, job.router))
    changed = {
        key for key in before if not torch.allclose(before[key], after[key], 0, 0, equal_nan=True)
    }
    assert changed == {'delta', *(key for key in before if key.startswith('router.'))}
    assert before['delta'].isnan() and after['delta'].isfinite()


@pytest.mark.parametrize('step', [1, 2])
def test_a_dry_run_says_what_would_be_trained(job, digits, inside, tmp_path, capfd, step):
    given = {'load_from': job.cascade} if step == 2 else {}
    inside(
        ROOT / 'tools/train.py',
        STEP_1 if step == 1 else STEP_2,
        '--dry-run',
        '--work-dir',
        tmp_path / 'dry',
        *options(digits, **{'train_cfg.max_epochs': 5}, **given),
    )
    said = dict(line.split(': ', 1) for line in capfd.readouterr().out.splitlines() if ': ' in line)
    assert said['step'].startswith(f'{step}, ')
    assert 'DynamicDetector of FasterRCNN on ' in said['detector'] and '2 exits' in said['detector']
    assert said['training data'].startswith('12 images, batches of 4; CocoDataset ')
    assert said['training data'].endswith('instances_train.json')
    assert said['validation data'].startswith('6 images, ')
    assert said['iterations'] == '15, in 5 epochs of 3'
    hooks = said["hooks, beside mmengine's and mmdet's"]
    if step == 1:
        assert said['weights'] == 'random, all of them' and 'RouterHook' not in hooks
    else:
        start = f"load_from '{job.cascade}': for exits 0, 1, a checkpoint fills"
        assert said['weights'].startswith(start)
        assert 'RouterHook' in hooks
    assert not list(tmp_path.rglob('*.pth'))


def test_train_options(job, digits, inside, tmp_path):
    """The learning rate of a batch of 4 where the config says 8 is halved."""
    inside(
        ROOT / 'tools/train.py',
        STEP_1,
        '--auto-scale-lr',
        '--work-dir',
        tmp_path / 'wörk dir',
        *options(
            digits,
            **{
                'auto_scale_lr.base_batch_size': 8,
                'train_cfg.val_interval': 9,
                'optim_wrapper.optimizer.lr': 1e-3,
                'param_scheduler': '[]',
                'load_from': job.cascade,
            },
        ),
    )
    saved = read_checkpoint(str(tmp_path / 'wörk dir/epoch_1.pth'))
    assert saved['optimizer']['param_groups'][0]['lr'] == pytest.approx(5e-4)
    assert not (tmp_path / 'work_dirs').exists()


def test_resume_goes_on_where_it_was(job, digits, inside, tmp_path):
    shutil.copytree(job.cascade.parent, tmp_path / 'run')
    inside(
        ROOT / 'tools/train.py',
        STEP_1,
        '--resume',
        '--work-dir',
        tmp_path / 'run',
        *options(digits, **{'train_cfg.max_epochs': 5, 'train_cfg.val_interval': 9}),
    )
    saved = read_checkpoint(str(tmp_path / 'run/epoch_5.pth'))
    # 12 images in batches of 4.
    assert saved['meta']['epoch'] == 5 and saved['meta']['iter'] == 15


def test_resume_from_the_other_step(job, digits, inside, tmp_path, capsys):
    with pytest.raises(AssertionError):
        inside(
            ROOT / 'tools/train.py',
            STEP_2,
            '--resume',
            job.cascade,
            '--work-dir',
            tmp_path,
            *options(digits),
        )
    assert "error: the optimizer in '" in capsys.readouterr().err


# Calibration.


def test_what_a_calibration_writes(job, digits):
    checkpoint = read_checkpoint(str(job.calibrated))
    state, meta = checkpoint['state_dict'], checkpoint['meta']['calibration']
    scores = state['difficulties']
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert torch.equal(scores, scores.sort().values) and 0 <= scores[0] < scores[-1] <= 1
    assert (state['latencies'] > 0).all() and state['latencies'].isfinite().all()
    assert scores[2] <= state['threshold'] < scores[3]
    assert meta['ann_file'] == str(digits / 'annotations/instances_val.json')
    assert meta['images'] == 6 and meta['device'] and meta['hard_share'] == 0.5
    assert meta['checkpoint'] == str(job.router) and meta['config'] == str(STEP_2)
    assert [meta['lat1'], meta['lat2']] == pytest.approx(state['latencies'].tolist())
    assert meta['threshold'] == pytest.approx(state['threshold'].item())
    assert 'calibrated on 6 images' in job.said[2] and 'written to calibrated.pth' in job.said[2]


def test_out_leaves_the_original_alone(job):
    before, after = (read_checkpoint(str(path)) for path in (job.router, job.calibrated))
    assert 'calibration' not in before['meta'] and not len(before['state_dict']['difficulties'])
    assert before['state_dict'].keys() == after['state_dict'].keys()
    for key, value in before['state_dict'].items():
        assert key in CALIBRATION or torch.equal(value, after['state_dict'][key])
    assert set(after) == set(before) and 'optimizer' in after


def test_a_calibration_into_the_checkpoint(job, digits, inside, tmp_path):
    """Once more over an old one, with another share."""
    path = shutil.copy(job.calibrated, tmp_path / 'own.pth')
    inside(ROOT / 'tools/calibrate.py', STEP_2, path, '--hard-share', '1', *options(digits))
    state = read_checkpoint(str(path))
    assert state['state_dict']['threshold'] == -1
    assert state['meta']['calibration']['hard_share'] == 1
    assert [file.name for file in tmp_path.iterdir()] == ['own.pth']


# Testing.


def test_half_of_the_images_are_hard(job, digits):
    """The calibration's images themselves: that share exactly, the harder ones."""
    said = succeed(
        run_tool(
            'test.py',
            STEP_2,
            job.calibrated,
            '--hard-share',
            '0.5',
            '--out',
            'half/found.pkl',
            '--show-dir',
            'pictures',
            '--work-dir',
            'tésting',
            cwd=job.folder,
            *options(
                digits,
                **{
                    'test_dataloader.dataset.ann_file': 'annotations/instances_val.json',
                    'test_dataloader.dataset.data_prefix.img': 'val/',
                    'test_evaluator.ann_file': digits / 'annotations/instances_val.json',
                },
            ),
        )
    )
    assert 'coco/bbox_mAP' in said
    found = results(job.folder / 'half/found.pkl')
    assert sum(entry['exit'] for entry in found) == 3
    scores = np.array([entry['difficulty'] for entry in found])
    state = read_checkpoint(str(job.calibrated))['state_dict']
    np.testing.assert_allclose(np.sort(scores), state['difficulties'], atol=1e-6)
    assert [entry['exit'] for entry in found] == (scores > np.median(scores)).astype(int).tolist()
    assert len(list((job.folder / 'tésting').rglob('pictures/*.jpg'))) == 6


@pytest.mark.parametrize('threshold, exit', [('-1', 1), ('1', 0)])
def test_either_end(job, digits, inside, tmp_path, threshold, exit):
    inside(
        ROOT / 'tools/test.py',
        STEP_2,
        job.router,
        f'--threshold={threshold}',
        '--out',
        tmp_path / 'found.pkl',
        *options(digits),
    )
    assert exits(tmp_path / 'found.pkl') == [exit] * 6


def test_the_ends_find_other_boxes(job, digits, inside, tmp_path):
    scores = []
    for threshold in (1, -1):
        inside(
            ROOT / 'tools/test.py',
            STEP_2,
            job.router,
            '--out',
            tmp_path / 'found.pkl',
            *options(
                digits,
                **{
                    'model.budget.threshold': threshold,
                    # Four epochs need not make it sure of anything.
                    'model.detector.test_cfg.rcnn.score_thr': 0.0,
                },
            ),
        )
        scores.append(
            [
                entry['pred_instances']['scores'].tolist()
                for entry in results(tmp_path / 'found.pkl')
            ]
        )
    assert any(scores[0]) and scores[0] != scores[1]


def test_a_latency_with_test_time_augmentation(job, digits, inside, tmp_path):
    latencies = read_checkpoint(str(job.calibrated))['state_dict']['latencies'].tolist()
    inside(
        ROOT / 'tools/test.py',
        STEP_2,
        job.calibrated,
        '--target-latency',
        max(latencies) + 1,
        '--tta',
        '--out',
        tmp_path / 'found.pkl',
        *options(digits),
    )
    results(tmp_path / 'found.pkl')
    # At the other end, where exit 0 sees the image at half its size.
    inside(
        ROOT / 'tools/test.py', STEP_2, job.calibrated, '--threshold', 1, '--tta', *options(digits)
    )


@pytest.fixture
def clear(job, tmp_path):
    """The calibrated checkpoint with latencies that lie far apart: 10 and 30 ms."""
    checkpoint = read_checkpoint(str(job.calibrated))
    checkpoint['state_dict']['latencies'] = torch.tensor([0.01, 0.03])
    checkpoint['state_dict']['difficulties'] = torch.linspace(0, 1, 5)
    torch.save(checkpoint, tmp_path / 'clear.pth')
    return tmp_path / 'clear.pth'


def test_a_budget_that_is_missed_is_said(clear, digits, inside, tmp_path, capfd):
    """Calibrated on images that were all easier, on another machine."""
    checkpoint = read_checkpoint(str(clear))
    checkpoint['state_dict'].update(
        difficulties=torch.linspace(0, 1e-6, 1000), gflops=torch.tensor([1.0, 2.0])
    )
    checkpoint['meta']['calibration'].update(device='another machine')
    torch.save(checkpoint, tmp_path / 'other.pth')
    inside(
        ROOT / 'tools/test.py',
        STEP_2,
        tmp_path / 'other.pth',
        '--target-latency',
        0.012,
        '--work-dir',
        tmp_path / 'run',
        *options(digits, **{'test_dataloader.batch_size': 2}),
    )
    out, err = capfd.readouterr()
    hard, cost = out.splitlines()[-2:]
    assert hard == 'hard: 10.0% wanted, 100.0% served (6 of 6 images)'
    assert cost.startswith(
        "per image: 2 GFLOPs, 12.0 ms wanted, 30.0 ms by the exits' own latencies, "
    )
    assert cost.endswith(' ms by the clock')
    warned = [line for line in err.splitlines() if line.startswith('warning: ')]
    assert 'were measured with device another machine' in warned[0]
    assert '100.0% of these 6 images are hard, and 10.0% were wanted' in warned[1]
    (logged,) = (
        json.loads(path.read_text().splitlines()[-1])
        for path in (tmp_path / 'run').glob('2*/2*.json')
    )
    assert logged['budget/exit1_share'] == 1 and logged['budget/exit1_wanted'] == pytest.approx(0.1)


@pytest.mark.parametrize('target, threshold', [(0.01, 1), (0.018, 0.625), (0.03, -1)])
def test_a_latency_is_a_threshold(clear, digits, inside, tmp_path, target, threshold):
    inside(
        ROOT / 'tools/test.py',
        STEP_2,
        clear,
        '--target-latency',
        target,
        '--out',
        tmp_path / 'found.pkl',
        *options(digits),
    )
    found = results(tmp_path / 'found.pkl')
    assert [entry['exit'] for entry in found] == [
        int(entry['difficulty'] > threshold) for entry in found
    ]


# By other ways in.


def test_mmdets_own_test(job, digits):
    """From another folder, beside nothing of ours but the config."""
    done = subprocess.run(
        [
            sys.executable,
            MMDET_TOOLS / 'test.py',
            STEP_2,
            job.calibrated,
            '--out',
            'mmdet.pkl',
            *options(digits),
        ],
        cwd=job.folder,
        env={**os.environ, 'PYTHONPATH': ''},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert 'coco/bbox_mAP' in succeed(done)
    found = results(job.folder / 'mmdet.pkl')
    threshold = read_checkpoint(str(job.calibrated))['state_dict']['threshold'].item()
    assert [entry['exit'] for entry in found] == [
        int(entry['difficulty'] > threshold) for entry in found
    ]


def test_mmdets_own_train(job, digits, inside, tmp_path):
    # mmdet's command line takes the spaces out of paths.
    cascade = shutil.copy(job.cascade, tmp_path / 'cascade.pth')
    inside(
        MMDET_TOOLS / 'train.py',
        STEP_2,
        '--work-dir',
        tmp_path,
        *options(digits, load_from=cascade, **{'train_cfg.val_interval': 9}),
    )
    state = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['state_dict']
    assert state['delta'].isfinite()


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh'])
def test_shell_scripts_parse(name):
    subprocess.run(['bash', '-n', ROOT / 'tools' / name], check=True)


@pytest.mark.parametrize(
    'name, own, expected',
    [
        (
            'dist_train.sh',
            ['a config.py', '8', '--resume'],
            '--nproc_per_node=8|{tools}/train.py|a config.py|--launcher|pytorch|--resume',
        ),
        (
            'dist_test.sh',
            ['a config.py', 'x.pth', '2', '--out', 'b c.pkl'],
            '--nproc_per_node=2|{tools}/test.py|a config.py|x.pth|--launcher|pytorch|--out|b c.pkl',
        ),
    ],
)
def test_what_shell_scripts_run(tmp_path, name, own, expected):
    """By a python that says what it was given."""
    (tmp_path / 'python').write_text('#!/bin/sh\nfor item; do printf "%s|" "$item"; done\n')
    (tmp_path / 'python').chmod(0o755)
    done = subprocess.run(
        ['bash', ROOT / 'tools' / name, *own],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PORT': '29511'},
    )
    assert done.stdout.startswith('-m|torch.distributed.run|')
    assert '--master_port=29511|' in done.stdout
    assert done.stdout.endswith(expected.format(tools=ROOT / 'tools') + '|')
