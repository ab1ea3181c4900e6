"""Step 2: require a cascade, measure the gains, keep them."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from dynamicdet.cascade.router_learning import TrainingSetMeasure, add_class_counts, set_gains
from dynamicdet.errors import UsageError
from dynamicdet.routing import GAINS

from .dynamic_detector import DynamicDetector

#: How many of the latest gains the online estimate looks at.
_WINDOW = 10_000
#: Below Detectron2's, whose set-up prints it.
_log = logging.getLogger('detectron2.dynamicdet')


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside ``DistributedDataParallel``."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class RouterHook(HookBase):
    """Everything that step 2 needs beside the usual loop.

    * It refuses to train the router of what is no trained cascade.
    * It measures the training set's gains, ``L1 - L2`` or whatever the objective counts, before
      training (``exact``) or while training (``online``): their quantiles, which ranks and offsets
      follow from, and delta, their median. They are the same on all ranks and are kept over a
      resume, by the checkpoints of `PeriodicCheckpointer`. The pass before training also
      standardizes what the router sees.

    Args:
        every_image (Callable): Gives an iterable over the training set's batches, each image once,
            this rank's part of it. Called once, if at all.
        delta (str): 'exact' or 'online'. Defaults to 'exact'.
    """

    def __init__(self, every_image: Callable[[], Iterable], delta: str = 'exact') -> None:
        if delta not in ('exact', 'online'):
            raise UsageError(f"the router's DELTA must be 'exact' or 'online', got '{delta}'")
        self.every_image, self.delta = every_image, delta
        self.window: deque = deque(maxlen=_WINDOW)
        self._resumed = False

    @property
    def _model(self) -> DynamicDetector:
        return unwrap(self.trainer.model)

    def require_cascade(self) -> None:
        """Raise a `UsageError` if what was loaded is no trained cascade."""
        if not self._model.has_cascade:
            raise UsageError(
                'step 2 trains the router of a trained cascade, and none was loaded: run step 1 '
                'first, or name its checkpoint by MODEL.WEIGHTS (LazyConfig: '
                'train.init_checkpoint)'
            )

    def before_train(self) -> None:
        """Raise a `UsageError` without weights of step 1; measure an exact delta."""
        model = self._model
        if not isinstance(model, DynamicDetector) or not model.train_router:
            raise UsageError(
                'RouterHook trains the router of a DynamicDetector in step 2 (TRAIN_ROUTER True); '
                f'this is {type(model).__name__} in step 1'
            )
        self.require_cascade()
        if self._resumed:
            return
        model.forget_calibration()
        if self.delta == 'exact':
            gains, mean, std = measure_training_set(model, self.every_image())
            set_gains(model, list(gains.values()))
            model.router.mean.copy_(mean)
            model.router.std.copy_(std)
            said = GAINS[model.objective.gain].said + ', by class' * model.objective.by_class
            _log.info(
                f'delta = {model.delta.item():.4f}, the median of {said} over {len(gains)} '
                'training images'
            )

    def after_step(self) -> None:
        """Online: move delta to the median of the last gains of all ranks."""
        if self.delta != 'online':
            return
        model = self._model
        counts = model.last_class_counts.tolist() if model.objective.by_class else []
        for gains, seen in comm.all_gather((model.last_gains.tolist(), counts)):
            self.window.extend(gains)
            add_class_counts(model, seen)
        set_gains(model, self.window)

    def state_dict(self) -> dict:
        """Quantiles of the gains, (101,), and what kind of gain they are of."""
        model = self._model
        state = dict(gains=model.gains.tolist(), gain=model.objective.counts_gains_as)
        if model.objective.by_class:
            state['class_counts'] = model.class_counts.tolist()
        if self.delta == 'online':
            state['window'] = list(self.window)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take up what a run that is resumed has measured."""
        model = self._model
        wanted = model.objective.counts_gains_as
        if state['gain'] != wanted:
            raise UsageError(
                f"this run's router learns from gains of kind '{state['gain']}', and the objective "
                f"of this config from '{wanted}': resume with the old objective, or start step 2 "
                'anew'
            )
        model.gains.copy_(torch.tensor(state['gains']))
        model.class_counts = model.class_counts.new_tensor(state.get('class_counts', []))
        self.window.extend(state.get('window', ()))
        self._resumed = True


@torch.no_grad()
def measure_training_set(
    model: DynamicDetector, batches: Iterable[Sequence[dict]]
) -> tuple[dict, Tensor, Tensor]:
    """What step 2 needs to know of the training set, by one pass over it; the same on all ranks.

    Args:
        model (DynamicDetector): In step 2.
        batches (Iterable): This rank's part of the images, with ``instances``.

    Returns:
        tuple: Gains, as the objective counts them, by (image id, path), and mean and standard
            deviation of what the router sees, (d,) each.
    """
    model.train()
    measure = TrainingSetMeasure(model.objective.by_class)
    total, start = len(batches) if hasattr(batches, '__len__') else None, time.monotonic()
    last = start
    for number, batch in enumerate(batches, 1):
        if measure.by_class:
            gains, counts, features = model.class_gains(batch)
        else:
            (gains, features), counts = model.exit_gains(batch), None
        keys = [
            (inputs.get('image_id', (comm.get_rank(), number, row)), inputs.get('file_name'))
            for row, inputs in enumerate(batch)
        ]
        measure.add(keys, gains, features, counts)
        now = time.monotonic()
        if now - last > 10 or number == total:
            eta = f'  eta: {(now - start) / number * (total - number):.0f} s' if total else ''
            _log.info(f'delta [{number}/{total or "?"}]{eta}')
            last = now
    return measure.result(model, comm.all_gather)
