"""Two processes over gloo on loopback do what one does."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, free_port, load_small, load_small_router, on_findable, run_tool, train
from dynamicdet.building import build_loader, load_dynamic_detector
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.files import latest_checkpoint
from dynamicdet.measuring.calibration import measure_difficulties

# Imported by each process through the config's `custom_imports`.
_STATES = '''
import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook


@HOOKS.register_module()
class SaveStates(Hook):
    """Saves each rank's own model when training has ended."""

    def __init__(self, folder):
        self.folder, self.flips = folder, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.flips.append([sample.get('flip') for sample in data_batch['data_samples']])

    def after_train(self, runner):
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        assert not runner.model.find_unused_parameters
        torch.save(runner.model.module.state_dict(), f'{self.folder}/rank{runner.rank}.pth')
        torch.save(self.flips, f'{self.folder}/flips{runner.rank}.pth')
'''


def run_on_two(tool, cfg, folder, *arguments, launcher=False):
    """Run a tool in two processes; by ``torch.distributed.run``, as users do, or forked."""
    (folder / 'rank_states.py').write_text(_STATES)
    cfg.custom_imports = dict(imports=['dynamicdet', 'rank_states'])
    cfg.dump(folder / 'config.py')
    arguments = (
        folder / 'config.py',
        *arguments,
        '--launcher',
        'pytorch',
        '--no-data-check',
        '--work-dir',
        folder / 'work',
        '--cfg-options',
        'env_cfg.dist_cfg.backend=gloo',
    )
    environment = {
        'PYTHONPATH': f'{folder}:{os.environ.get("PYTHONPATH", "")}',
        # Also on a machine with a GPU: two processes on one would be refused.
        'CUDA_VISIBLE_DEVICES': '-1',
    }
    if launcher:
        result = subprocess.run(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--nproc_per_node=2',
                '--master_addr=127.0.0.1',
                f'--master_port={free_port()}',
                str(ROOT / 'tools' / tool),
                *map(str, arguments),
            ],
            env={**os.environ, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
    else:
        result = run_tool(tool, *arguments, timeout=600, cwd=folder, ranks=2, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def ranks(folder):
    return [torch.load(folder / f'rank{rank}.pth') for rank in (0, 1)]


def train_on_two(cfg, folder, *arguments, **settings):
    cfg.custom_hooks.append(dict(type='SaveStates', folder=str(folder)))
    return run_on_two('train.py', cfg, folder, *arguments, **settings)


def differing(first, second):
    """Names of the entries in which two states differ."""
    return {
        name
        for name, value in first.items()
        if not torch.equal(value, second[name]) and not value.isnan().all()
    }


def test_step_2_on_two_processes(digits, cascade, tmp_path):
    """Delta and router are the same on both; delta is what one process measures. 11 images, so one
    of them is seen twice."""
    options = {'train_dataloader.dataset.indices': 11}
    printed = train_on_two(load_small_router(digits, tmp_path, cascade, **options), tmp_path)
    first, second = ranks(tmp_path)
    assert not differing(first, second)
    alone = train(load_small_router(digits, tmp_path / 'alone', cascade, **options)).model
    # Other images are in a batch together: sums of losses are rounded otherwise.
    assert first['delta'].item() == pytest.approx(alone.delta.item(), abs=1e-5)
    assert (
        'the median of the loss at the first exit less that at the last over 11 training images'
        in printed
    )
    before = read_checkpoint(latest_checkpoint(cascade))['state_dict']
    # All that training has changed, on either rank.
    changed = differing(first, before) - {'delta'}
    assert changed and all(name.startswith('router.') for name in changed)


def test_online_delta_on_two_processes(digits, cascade, tmp_path):
    """Each rank sees half of the images, yet both have the median of all."""
    cfg = load_small_router(digits, tmp_path, cascade, delta='online')
    train_on_two(cfg, tmp_path, launcher=True)
    first, second = ranks(tmp_path)
    assert not differing(first, second)
    seen = read_checkpoint(latest_checkpoint(tmp_path / 'work'))['router_differences']
    assert len(set(seen)) == 12
    assert first['delta'].item() == pytest.approx(torch.tensor(seen).quantile(0.5).item())


def test_step_1_on_two_processes(digits, tmp_path):
    """Every trained parameter takes part: DDP needs no search for unused ones. Ranks and epochs
    draw other flips, in workers that live on, and a resumed run the same."""
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        tmp_path,
        **{
            'train_cfg.max_epochs': 2,
            'train_dataloader.num_workers': 1,
            'train_dataloader.persistent_workers': True,
        },
    )
    cfg.train_dataloader.dataset.pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
    resumed = copy.deepcopy(cfg)
    train_on_two(cfg, tmp_path)
    first, second = ranks(tmp_path)
    # As in any DDP run without SyncBN, statistics are each rank's own.
    assert all('.running_' in name for name in differing(first, second))
    state = read_checkpoint(latest_checkpoint(tmp_path / 'work'))['state_dict']
    assert not differing(first, state)
    flips = [torch.load(tmp_path / f'flips{rank}.pth') for rank in (0, 1)]
    epochs = [own[half : half + 2] for own in flips for half in (0, 2)]
    assert all(len(own) == 4 for own in flips) and len({str(epoch) for epoch in epochs}) == 4
    again = tmp_path / 'again'
    again.mkdir()
    train_on_two(resumed, again, '--resume', tmp_path / 'work' / 'epoch_1.pth')
    assert [torch.load(again / f'flips{rank}.pth') for rank in (0, 1)] == [own[2:] for own in flips]
    assert not differing(ranks(again)[0], first)


def metrics(work_dir, kind='coco/'):
    """What ``tools/test.py`` left in its JSON log."""
    (path,) = Path(work_dir).glob('2*/2*.json')
    # Each rank writes this file, and the end of a longer text may stand behind a shorter one.
    found, _ = json.JSONDecoder().raw_decode(path.read_text())
    return {name: value for name, value in found.items() if name.startswith(kind)}


def by_image(path):
    with open(path, 'rb') as file:
        return {result['img_id']: result for result in pickle.load(file)}


def test_testing_on_two_processes(digits, findable, cascade, tmp_path):
    """Same AP, and image by image the same boxes, with 11 images of which half are hard."""
    cfg = load_small(
        'dy_faster_rcnn_digits',
        digits,
        tmp_path,
        **{
            **on_findable(findable),
            'test_dataloader.batch_size': 1,
            'test_dataloader.dataset.indices': 11,
        },
    )
    checkpoint = latest_checkpoint(cascade)
    model, _ = load_dynamic_detector(cfg, checkpoint, 'cpu')
    scores = measure_difficulties(model, build_loader(cfg.test_dataloader), lambda steps, _: steps)
    # Between two scores: no image's exit may hang on the last bit.
    threshold = float(scores[4] + scores[5]) / 2
    cfg.dump(tmp_path / 'alone.py')
    arguments = (checkpoint, '--threshold', threshold, '--out')
    alone = run_tool(
        'test.py',
        tmp_path / 'alone.py',
        *arguments,
        tmp_path / 'alone.pkl',
        '--no-data-check',
        '--work-dir',
        tmp_path / 'alone',
        timeout=600,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    printed = run_on_two('test.py', cfg, tmp_path, *arguments, tmp_path / 'both.pkl')
    one, two = metrics(tmp_path / 'alone'), metrics(tmp_path / 'work')
    # Of both ranks together, the image that both see once.
    served = [metrics(tmp_path / name, 'budget/') for name in ('alone', 'work')]
    assert [found['budget/exit1_share'] for found in served] == [pytest.approx(6 / 11)] * 2
    assert all(found['budget/clock_milliseconds'] > 0 for found in served)
    assert printed.count('hard: 54.5% served (6 of 11 images)') == 1
    assert one == two and len(one) >= 6 and 0 < one['coco/bbox_mAP'] < 1
    assert re.search(r'Epoch\(test\) *\[6/6\]', printed)
    one, two = by_image(tmp_path / 'alone.pkl'), by_image(tmp_path / 'both.pkl')
    assert set(one) == set(two) and len(one) == 11
    assert sum(result['exit'] for result in one.values()) == 6
    for image, result in one.items():
        assert two[image]['exit'] == result['exit']
        for kind, value in result['pred_instances'].items():
            torch.testing.assert_close(two[image]['pred_instances'][kind], value)
