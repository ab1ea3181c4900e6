"""What lets a killed run, resumed, end as one that was not killed."""
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner, set_random_seed

from mmdet.registry import HOOKS


@HOOKS.register_module()
class ResumeHook(Hook):
    """Whole checkpoint files, and random numbers that depend on the epoch.

    mmengine restores weights, optimiser and schedules on resume, but no generator: without this,
    flips and sampled proposals after ``--resume`` differ from those of an uninterrupted run. It
    seeds python, numpy and torch before each training epoch from the run's seed, the epoch and the
    rank, and starts data workers anew, which take their seed when they start.
    """

    # Before all else that may draw.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.backend_args:
                hook.backend_args = dict(backend='atomic')

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.train_dataloader.persistent_workers:
            # The old workers end when their iterator is let go.
            runner.train_dataloader._iterator = None
        # Neighbouring epochs, seeds and ranks must not share a stream.
        set_random_seed((runner.seed * 1_000_003 + runner.epoch * 1_009 + runner.rank) % 2**31)
