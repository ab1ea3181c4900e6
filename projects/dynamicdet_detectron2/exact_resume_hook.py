"""Let a run that is resumed end as if it had never stopped."""

import logging
import random

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from .private_detectron2 import batch_iterator

#: Below Detectron2's, whose set-up prints it.
_log = logging.getLogger('detectron2.dynamicdet')


class ExactResumeHook(HookBase):
    """Seed the random numbers of each iteration by its number, and let a resumed run pass over the
    batches that it has seen: Detectron2 begins its data and its random numbers anew.

    Same seed, same machine, same bits. Passing over batches takes as long as loading them.

    Args:
        seed (int): Of the run, 0 or more.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train(self) -> None:
        """Pass over what was seen."""
        if self.trainer.start_iter:
            _log.info(f'passing over the batches of {self.trainer.start_iter} iterations')
        batches = batch_iterator(self.trainer)
        for number in range(self.trainer.start_iter):
            self._seed(number)
            next(batches)

    def before_step(self) -> None:
        """Seed this iteration."""
        self._seed(self.trainer.iter)

    def _seed(self, number: int) -> None:
        entropy = [self.seed, comm.get_rank(), number]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
