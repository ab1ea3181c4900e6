"""Killed at any moment, a run resumes with ``--resume`` to the same end, bit for bit."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, load_small, load_small_router, tool_server, train
from dynamicdet.checkpoints import read_checkpoint

#: Long enough for a kill after the first epoch to be far from the end.
_EPOCHS = 4
_LAST = f'epoch_{_EPOCHS}.pth'


def with_flips(cfg, workers=0):
    """Let the outcome depend on random numbers, drawn in the data workers where there are any."""
    cfg.train_dataloader.dataset.pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
    cfg.train_dataloader.update(num_workers=workers, persistent_workers=bool(workers))
    return cfg


class Run:
    """One config, run over and over by ``tools/train.py`` in processes of its own."""

    def __init__(self, cfg):
        self.work_dir = Path(cfg.work_dir)
        self.config = self.work_dir.with_suffix('.py')
        self.log = self.work_dir.with_suffix('.txt')
        self.log.write_text('')
        cfg.dump(self.config)

    def arguments(self, *more):
        return [str(self.config), '--work-dir', str(self.work_dir), '--no-data-check', *more]

    def start(self, *more):
        """Returns: int: The process."""
        return tool_server().start(
            ROOT / 'tools' / 'train.py',
            self.arguments(*more),
            self.work_dir.parent,
            dict(os.environ),
            (self.log, self.log),
            timeout=600,
        )

    def kill_when(self, ready, *arguments, then=0.0):
        """Start, wait until ``ready()`` and ``then`` some seconds more, and kill -9."""
        process = self.start(*arguments)
        try:
            while not ready() and not tool_server().ended():
                time.sleep(0.01)
            time.sleep(then)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            self.status = tool_server().wait()
        assert ready(), self.log.read_text()[-3000:]

    def kill_while_it_starts(self, then):
        """Start an interpreter of its own, and kill -9 after some seconds, imports or not."""
        with open(self.log, 'a') as log:
            process = subprocess.Popen(
                [sys.executable, ROOT / 'tools' / 'train.py', *self.arguments('--resume')],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work_dir.parent,
                env=os.environ,
            )
        time.sleep(then)
        process.kill()
        process.wait()

    def finish(self):
        self.start('--resume')
        assert tool_server().wait() == 0, self.log.read_text()[-3000:]

    def iterations(self):
        """How often the log said that an iteration was done, in all processes so far."""
        return self.log.read_text().count('Epoch(train)')

    def end(self):
        return read_checkpoint(str(self.work_dir / _LAST))


def kill_after_one_epoch(run):
    first, last = run.work_dir / 'epoch_1.pth', run.work_dir / _LAST
    run.kill_when(first.exists)
    assert run.status == -9 and not last.exists()
    # A file that is there is whole.
    assert read_checkpoint(str(first))['meta']['epoch'] == 1
    run.finish()
    assert 'resumed epoch:' in run.log.read_text()
    return run.end()


def kill_at_random(run, kills=3):
    """First while it starts, then some iterations, and part of one, after it went on to train."""
    rng = np.random.default_rng(0)
    run.kill_while_it_starts(rng.uniform(0, 3))
    # At least an epoch of 3 iterations, so that there is something to resume from.
    for more in rng.integers(3, 6, kills):
        goal = run.iterations() + more
        run.kill_when(lambda: run.iterations() >= goal, '--resume', then=rng.uniform(0, 0.1))
        for path in run.work_dir.glob('epoch_*.pth'):
            read_checkpoint(str(path))
    assert run.log.read_text().count('resumed epoch:') >= kills - 1
    run.finish()
    return run.end()


def uninterrupted(cfg):
    cfg.work_dir = f'{cfg.work_dir}_whole'
    train(cfg)
    return read_checkpoint(f'{cfg.work_dir}/{_LAST}')


@pytest.fixture(scope='module')
def ends(digits, cascade, tmp_path_factory):
    """Name -> checkpoints at the end of a run that was killed, and of one that was not."""
    root = tmp_path_factory.mktemp('resume')
    epochs = {'train_cfg.max_epochs': _EPOCHS}

    def configs():
        first, second = (
            load_small('dy_faster_rcnn_digits', digits, root / name, **epochs)
            for name in ('random', 'workers')
        )
        router = load_small_router(digits, root / 'router', cascade, **epochs)
        return dict(
            random=with_flips(first), workers=with_flips(second, 1), router=with_flips(router)
        )

    ways = dict(random=kill_at_random, workers=kill_after_one_epoch, router=kill_after_one_epoch)
    killed, whole = configs(), configs()
    return {
        name: (way(Run(killed[name])), uninterrupted(whole[name])) for name, way in ways.items()
    }


@pytest.mark.parametrize('name', ['random', 'workers', 'router'])
def test_a_killed_run_ends_as_one_that_was_not(ends, name):
    """Once killed at random moments, once with data workers that live on between epochs, once in
    step 2."""
    killed, whole = ends[name]
    assert killed['meta']['iter'] == whole['meta']['iter'] == 3 * _EPOCHS
    assert list(killed['state_dict']) == list(whole['state_dict'])
    for entry, value in whole['state_dict'].items():
        same = torch.equal(killed['state_dict'][entry], value)
        assert same or entry in ('delta', 'gflops', 'latencies') and value.isnan().all(), entry
    for index, state in whole['optimizer']['state'].items():
        for kind, value in state.items():
            assert torch.equal(killed['optimizer']['state'][index][kind], value), (index, kind)
    assert whole['state_dict']['delta'].isnan() == (name != 'router')


def test_data_workers_change_nothing(ends):
    """Flips are drawn in a worker that lives on between epochs, or in the process itself."""
    first, second = (ends[name][1]['state_dict'] for name in ('random', 'workers'))
    assert all(
        torch.equal(value.nan_to_num(), second[entry].nan_to_num())
        for entry, value in first.items()
    )
