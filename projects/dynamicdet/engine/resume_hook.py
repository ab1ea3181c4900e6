"""What lets a killed run, resumed, end as one that was not killed."""

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from mmdet.models.data_preprocessors import BatchSyncRandomResize
from mmdet.registry import HOOKS

from ..datasets.seeding import SeededBatchSampler, seed_samples
from ..private_mmengine import ranks_differ_in_seed, resumes, train_loader_settings, trains
from .unwrapping import unwrap


@HOOKS.register_module()
class ResumeHook(Hook):
    """Whole checkpoint files, and random numbers that depend on how far the run is.

    mmengine restores weights, optimizer and schedules on resume, but no generator: without this,
    flips and sampled proposals after ``--resume`` differ from those of an uninterrupted run, and
    data workers that start anew draw the same numbers in each epoch.

    * What pipelines draw has a seed for each sample: see `SeededBatchSampler`. It is the same with
        any
      number of data workers, whether they live on or not.
    * What else draws is seeded before each epoch, in a loop of iterations before each of them, from
      the run's seed, the epoch or iteration, and the rank.
    * The image size that YOLOX's ``BatchSyncRandomResize`` has drawn is kept in checkpoints.

    A pipeline that remembers images, such as one with ``CachedMosaic``, fills its memory anew after
    a resume; the log says so.
    """

    # Before all else that may draw.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Write checkpoints atomically, and seed the data of a training."""
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.backend_args:
                hook.backend_args = dict(backend='atomic')
        # Still a config when testing.
        if trains(runner):
            _seed_data(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resumed: give batch-wise resizes the size at which the run stopped."""
        if resumes(runner):
            for part, size in zip(_random_resizes(runner), checkpoint.get('batch_sizes', ())):
                part._input_size = size

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the current sizes of batch-wise resizes."""
        checkpoint['batch_sizes'] = [part._input_size for part in _random_resizes(runner)]

    def before_train(self, runner: Runner) -> None:
        """Log where a pipeline remembers images that no checkpoint holds."""
        if runner.epoch and _remembers_images(runner.train_dataloader):
            runner.logger.info(
                'The pipeline remembers images (CachedMosaic, CachedMixUp), which no checkpoint '
                'holds: this resumed run gathers new ones, and ends a little otherwise than an '
                'uninterrupted one'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed by epoch and rank, so that a resumed epoch draws as an uninterrupted one."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        _seed(runner, runner.epoch)
        if isinstance(runner.train_dataloader.batch_sampler, SeededBatchSampler):
            runner.train_dataloader.batch_sampler.epoch = runner.epoch

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Seed by iteration, or at the first iteration of an epoch once its workers run."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            _seed(runner, runner.iter)
        elif batch_idx == 0:
            # A loader draws one number where it starts workers, none where they live on.
            _seed(runner, runner.epoch)
            torch.empty((), dtype=torch.int64).random_()


def _seed(runner: Runner, step: int) -> None:
    # Neighboring epochs, seeds and ranks must not share a stream.
    set_random_seed((runner.seed * 1_000_003 + step * 1_009 + runner.rank) % 2**31)


def _seed_data(runner: Runner) -> None:
    loop = runner.train_loop
    restart = None
    if isinstance(loop, IterBasedTrainLoop):
        # It has started its workers already, and its samplers have moved on: anew.
        restart, loop.dataloader_iterator = type(loop.dataloader_iterator), None
        loop.dataloader = _built_anew(runner, loop.dataloader)
    seed_samples(loop.dataloader, runner.seed, runner.rank)
    if restart:
        loop.dataloader_iterator = restart(loop.dataloader)


def _built_anew(runner: Runner, loader: DataLoader) -> DataLoader:
    """The same loader, as mmengine builds it, of the data set that is there."""
    settings = train_loader_settings(runner)
    if settings is None:
        return loader
    settings = {**settings, 'dataset': _Itself(loader.dataset)}
    # The data set is cut to it already.
    settings.pop('num_batch_per_epoch', None)
    return runner.build_dataloader(
        settings, seed=runner.seed, diff_rank_seed=ranks_differ_in_seed(runner)
    )


class _Itself:
    """mmengine builds loaders from a copy of their config; a copy of this is the data set
    itself."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __deepcopy__(self, memo: dict):
        return self.dataset


def _random_resizes(runner: Runner) -> list[nn.Module]:
    model = unwrap(runner.model)
    return [part for part in model.modules() if isinstance(part, BatchSyncRandomResize)]


def _remembers_images(loader: DataLoader) -> bool:
    """Whether a pipeline has images of before in memory after an epoch."""
    if loader.num_workers and not loader.persistent_workers:
        return False
    steps = getattr(loader.dataset, 'pipeline', ())
    return any(hasattr(step, 'results_cache') for step in getattr(steps, 'transforms', steps))
