"""Step 2: start from a cascade, measure the gains, keep them."""

import ast
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_gather_object
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from mmdet.registry import HOOKS

from ..cascade.router_learning import TrainingSetMeasure, add_class_counts, set_gains
from ..cascade.weights import forget_other_router, require_complete
from ..datasets.seeding import SeededBatchSampler, seed_samples
from ..errors import UsageError
from ..files import latest_checkpoint
from ..private_mmengine import path_to_load, resumes, start_anew, start_from, trains
from ..routing import GAINS, class_weights
from .unwrapping import unwrap

#: How many of the latest gains the online estimate looks at. The released code lets its
#: list grow without bound and measures at each of the first 10,000 iterations.
_WINDOW = 10_000


@HOOKS.register_module()
class RouterHook(Hook):
    """Everything that step 2 needs beside the usual loop.

    * It starts from a cascade: ``load_from`` or, where that is not given, the latest checkpoint in
      ``cascade``. It refuses to train a router on anything else. Where plain weights are all that
      the exits have (one backbone, pairs), ``load_from`` of step 1's config will do.
    * It measures the training set's gains, ``L1 - L2`` or whatever the objective counts, before
      training (``exact``) or while training (``online``): their quantiles, which ranks and offsets
      follow from, and delta, their median, both in the precision of the training (``--amp``:
      autocast). They are the same on all ranks and are kept over a resume.
      The pass before training also standardizes what the router sees.
    * Where regions are looked at again, it is their router that is trained: it starts at the rule,
      and classes weigh as the annotations of the training set have them.

    Args:
        cascade (str, optional): Work dir of step 1. Defaults to None: ``load_from`` is needed.
        delta (str): 'exact' passes once over the training set; 'online' goes by the last 10,000
            images seen. Defaults to 'exact'.
    """

    # Before hooks that copy weights, such as EMAHook, see the checkpoint.
    priority = 'ABOVE_NORMAL'

    def __init__(self, cascade: str | None = None, delta: str = 'exact') -> None:
        if delta not in ('exact', 'online'):
            raise UsageError(f"RouterHook's delta must be 'exact' or 'online', got '{delta}'")
        self.cascade = cascade
        self.delta = delta
        self.training = False
        self.loaded = False
        self.window: deque = deque(maxlen=_WINDOW)

    def before_run(self, runner: Runner) -> None:
        """Find what to start from: this run's own last checkpoint, or step 1's."""
        # Built by now when training; still a config when testing.
        self.training = trains(runner)
        if (
            self.training
            and self.cascade
            and not resumes(runner)
            and inherits_load_from(runner.cfg)
            and (unwrap(runner.model).needs_step_one or latest_checkpoint(self.cascade))
        ):
            runner.logger.info(
                f"step 2 does not start from load_from='{path_to_load(runner)}', which its config "
                'inherits '
                f"from step 1's, but from step 1's last checkpoint in {self.cascade}"
            )
            start_from(runner, None)
            # mmengine has written the config already.
            runner.cfg.load_from = None
            runner.dump_config()
        if not self.training or path_to_load(runner) is not None:
            return
        if resumes(runner):
            start_from(runner, latest_checkpoint(runner.work_dir))
        if path_to_load(runner) is None and self.cascade:
            start_anew(runner)
            start_from(runner, latest_checkpoint(self.cascade))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse what does not fit; forget what a new router makes stale."""
        model = unwrap(runner.model)
        state = checkpoint.get('state_dict', checkpoint)
        starting = self.training and not resumes(runner)
        if starting:
            drop_other_router(runner, model, state)
        if self.training:
            try:
                require_complete(model, state, optional=('router.',) if starting else ())
            except UsageError as error:
                raise UsageError(
                    f"'{path_to_load(runner)}': {error}"
                    + (
                        "; step 2 starts from step 1's result: remove load_from, or name a "
                        'checkpoint of step 1'
                        if starting
                        else ''
                    )
                ) from None
        if starting:
            for name in ('delta', 'difficulties', 'gflops', 'latencies', 'threshold'):
                state[name] = getattr(model, name).detach().clone()
            if model.regions is not None:
                state['regions.curve'] = model.regions.curve[:0].clone()
        elif self.training:
            wanted = model.objective.counts_gains_as
            learned = checkpoint.get('router_gain', wanted)
            if learned != wanted:
                raise UsageError(
                    f"this run's router learns from gains of kind '{learned}', and the objective "
                    'of '
                    f"this config from '{wanted}': resume with the old objective, or start step 2 "
                    'anew'
                )
            model.class_counts = model.class_counts.new_tensor(
                checkpoint.get('router_class_counts', [])
            )
            self.window.extend(checkpoint.get('router_differences', ()))
            if checkpoint.get('router_gains'):
                model.gains.copy_(torch.tensor(checkpoint['router_gains']))
        self.loaded = True

    def before_train(self, runner: Runner) -> None:
        """Raise a `UsageError` without weights of step 1; measure an exact delta."""
        model = unwrap(runner.model)
        if not self.loaded:
            where = f' (into {self.cascade})' if self.cascade else ''
            raise UsageError(
                'step 2 trains the router of a trained cascade, and none was loaded: run step 1 '
                f'first{where}, or name its checkpoint by --cfg-options load_from=...'
            )
        copy_frozen_averages(runner)
        starts_regions = model.regions is not None and bool(model.gains.isnan().any())
        if starts_regions:
            counts = count_labels(runner.train_dataloader.dataset, len(model.regions.class_weights))
            model.regions.class_weights.copy_(torch.from_numpy(class_weights(counts)))
        # Runs of before there were quantiles kept delta alone.
        if self.delta == 'exact' and model.gains.isnan().any():
            gains, mean, std = measure_training_set(runner)
            set_gains(model, list(gains.values()))
            model.trained_router.mean.copy_(mean)
            model.trained_router.std.copy_(std)
            said = GAINS[model.objective.gain].said + ', by class' * model.objective.by_class
            if model.regions is not None:
                said = 'what the cells of an image gain'
            runner.logger.info(
                f'delta = {model.delta.item():.4f}, the median of {said} over {len(gains)} '
                'training images'
            )
        if starts_regions:
            model.regions.router.start_training()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Online: move delta to the median of the last gains of all ranks."""
        if self.delta == 'online':
            model = unwrap(runner.model)
            by_class = model.objective.by_class and model.regions is None
            counts = model.last_class_counts.tolist() if by_class else []
            for gains, seen in all_gather_object((model.last_gains.tolist(), counts)):
                self.window.extend(gains)
                add_class_counts(model, seen)
            set_gains(model, self.window)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the quantiles of the gains, (101,), and what kind of gain they are of."""
        model = unwrap(runner.model)
        checkpoint['router_gains'] = model.gains.tolist()
        checkpoint['router_gain'] = model.objective.counts_gains_as
        if model.objective.by_class:
            checkpoint['router_class_counts'] = model.class_counts.tolist()
        if self.delta == 'online':
            checkpoint['router_differences'] = list(self.window)


def copy_frozen_averages(runner: Runner) -> None:
    """Let averages of weights that do not change be these weights: an average of equal numbers may
    be off by their last bit, and step 2 changes no weight but the router's."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            # It is given values without their flags: where they lie tells which they are of.
            trained = {
                parameter.data_ptr()
                for parameter in unwrap(runner.model).trained_router.parameters()
            }
            hook.ema_model.avg_func = partial(_average, hook.ema_model.avg_func, trained)


def _average(average: Callable, trained: set, averaged: Tensor, source: Tensor, steps: int) -> None:
    if source.data_ptr() in trained:
        average(averaged, source, steps)
    else:
        averaged.copy_(source)


def inherits_load_from(cfg: Config) -> bool:
    """Whether a config's ``load_from`` is that of a config it is built on: what step 1 started
    from, where the config is step 2's. One that the config's own file sets, or that a command line
    set, is meant; `cli.override` knows of the latter where the two are the same."""
    path, value = Path(cfg.filename or ''), cfg.get('load_from')
    if not value or path.suffix != '.py' or not path.is_file():
        return False
    assigned = {
        target.id
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return 'load_from' not in assigned and Config.fromfile(path).get('load_from') == value


def leaves_load_from_unused(cfg: Config) -> bool:
    """Whether a config is of a step 2 that starts from its `RouterHook`'s ``cascade``, and not from
    the ``load_from`` that it inherits."""
    return (
        not cfg.get('resume')
        and inherits_load_from(cfg)
        and any(
            hook.get('type') == 'RouterHook'
            and hook.get('cascade')
            and (_has_step_one(cfg.model) or latest_checkpoint(hook['cascade']))
            for hook in cfg.get('custom_hooks') or ()
        )
    )


def _has_step_one(model: Config) -> bool:
    """As `DynamicDetector.needs_step_one`, by its config."""
    return isinstance(model.get('detector'), Mapping) and model.get('backbones', 2) > 1


def drop_other_router(runner: Runner, model, state: dict[str, Tensor]) -> None:
    """Let go of a checkpoint's router that is another than this config's: step 2 trains one
    anyway."""
    deltas = [value for key, value in state.items() if key.removeprefix('module.') == 'delta']
    if forget_other_router(model, state):
        trained = bool(deltas) and bool(deltas[0].isfinite().all())
        runner.logger.log(
            logging.WARNING if trained else logging.INFO,
            f"the checkpoint's {'' if trained else 'un'}trained router is another than this "
            "config's "
            '(such as other pools): it starts anew',
        )


def count_labels(dataset, classes: int) -> np.ndarray:
    """Objects of each class that a data set's annotations have, (C,), crowds left out. No image is
    read."""
    while not hasattr(dataset, 'get_data_info'):
        # A wrapper that mixes images.
        dataset = dataset.dataset
    labels = [
        instance['bbox_label']
        for row in range(len(dataset))
        for instance in dataset.get_data_info(row).get('instances', ())
        if not instance.get('ignore_flag')
    ]
    return np.bincount(np.asarray(labels, np.int64), minlength=classes)


@torch.no_grad()
def measure_training_set(runner: Runner) -> tuple[dict[tuple, float], Tensor, Tensor]:
    """What step 2 needs to know of the training set, by one pass over it; the same on all ranks.

    Returns:
        tuple: Gains, as the objective counts them, by (image id, path), and mean and standard
            deviation of what the router sees, (d,) each.
    """
    model = unwrap(runner.model)
    model.train()
    measure = TrainingSetMeasure(model.objective.by_class and model.regions is None)
    for batch in with_progress(runner, every_image(runner.train_dataloader), 'delta'):
        # In the precision of the training, as its iterations measure gains.
        with runner.optim_wrapper.optim_context(runner.model):
            data = model.data_preprocessor(batch, training=True)
            arguments = data['inputs'], data['data_samples']
            if measure.by_class:
                gains, counts, features = model.class_gains(*arguments)
            else:
                (gains, features), counts = model.exit_gains(*arguments), None
        # By both: data sets that are concatenated may use an id twice.
        keys = [
            (sample.get('img_id', len(measure) + row), sample.get('img_path'))
            for row, sample in enumerate(data['data_samples'])
        ]
        measure.add(keys, gains, features, counts)
    return measure.result(model, all_gather_object)


def every_image(loader: DataLoader) -> DataLoader:
    """This rank's part of a loader's data, in order. The loader's own samplers may be endless, as
    those of iteration-based loops are, or leave images out."""
    every = DataLoader(
        loader.dataset,
        batch_size=getattr(loader.batch_sampler, 'batch_size', 1),
        sampler=DefaultSampler(loader.dataset, shuffle=False),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )
    if isinstance(loader.batch_sampler, SeededBatchSampler):
        seed_samples(every, loader.batch_sampler.seed, loader.batch_sampler.rank)
    return every


def with_progress(runner: Runner, batches: Iterable, what: str, every: float = 10.0) -> Iterable:
    """Iterate, and log how far it is and how long it will take, every few seconds."""
    total, start = len(batches), time.monotonic()
    last = start
    for index, batch in enumerate(batches):
        yield batch
        now = time.monotonic()
        if now - last >= every or index + 1 == total:
            eta = (now - start) / (index + 1) * (total - index - 1)
            runner.logger.info(f'{what} [{index + 1}/{total}]  eta: {eta:.0f} s')
            last = now
