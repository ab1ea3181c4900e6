"""Train for integers of 8 bits: when, not what."""

import logging
from collections.abc import Mapping
from types import MethodType

import torch.distributed as dist
import torch.nn.functional as F
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import Tensor, nn

from dynamicdet.compression.quantization import NORM_KINDS
from dynamicdet.compression.quantized_training import QuantizedTraining, Ranks
from dynamicdet.errors import UsageError

from .parts import find_parts
from .router_hook import unwrap

#: Below Detectron2's, whose set-up prints it.
_log = logging.getLogger('detectron2.dynamicdet')
NORM_KINDS.append(FrozenBatchNorm2d)


class QuantizationHook(HookBase):
    """Let a trained detector, plain or dynamic, get used to 8 bits: quantization-aware training.

    From ``start`` on, parts compute as their int8 graphs will: weights and activations are rounded,
    gradients pass. Norms stay as they are, in eval mode. Tests while training are in 8 bits, too,
    and so are those of `train_net.py --eval-only` with the same config. The trained model stays so
    until `remove`.

    Checkpoints hold the detector's ordinary keys, in float32; the ranges of activations are beside
    them, in the trainer's part. The ranks have the same ranges.

    Args:
        start (int): Iterations done before anything is rounded. Until then ranges are watched.
        observe (int, optional): Iterations done when ranges come to rest; never by default.
        noise (float), reduced_range (bool), ranges (str), rate (float), float_share (float): See
            `dynamicdet.compression.quantized_training.QuantizedTraining`.
    """

    def __init__(
        self,
        start: int = 0,
        observe: int | None = None,
        noise: float = 1.0,
        reduced_range: bool = False,
        ranges: str = 'running',
        rate: float = 0.001,
        float_share: float = 0.1,
    ) -> None:
        self.training = QuantizedTraining(
            start, observe, noise, reduced_range, ranges, rate, float_share
        )
        self._saved: Mapping | None = None

    def before_train(self) -> None:
        """Check the run, find the parts and install the rounding."""
        model = unwrap(self.trainer.model)
        if getattr(model, 'train_router', False):
            raise UsageError(
                'QuantizationHook: this config trains a router alone, and nothing else may change; '
                'quantize in step 1, and train the router with SOLVER.QUANTIZATION.ENABLED False'
            )
        if self.training.start >= self.trainer.max_iter:
            raise UsageError(
                f'QuantizationHook: rounding begins after {self.training.start} iterations, but '
                f'the run has {self.trainer.max_iter}'
            )
        self.install(model, self._saved)
        bits = 7 if self.training.reduced_range else 8
        _log.info(f'rounded to {bits} bits: {", ".join(self.training.simulations)}')

    def before_step(self) -> None:
        """Round from ``start`` on; observe or learn ranges until ``observe``, then keep them."""
        self.training.begin_step(self.trainer.iter)

    def after_step(self) -> None:
        """Agree with other ranks on the ranges; what tests now finds them at rest."""
        self.training.finish_step(Ranks(comm.get_world_size(), comm.all_gather, _sum))
        self.training.rest()

    def state_dict(self) -> dict:
        """Ranges and settings."""
        return self.training.state() if self.training.installed else {}

    def load_state_dict(self, state: dict) -> None:
        """Keep what a run that is resumed has saved."""
        self._saved = state

    def install(self, model: nn.Module, saved: Mapping | None = None) -> None:
        """Put the rounding in a model's parts.

        Args:
            model (nn.Module): Plain or dynamic.
            saved (Mapping, optional): What `state_dict` gave.
        """
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.forward = MethodType(_always_one_call, module)
        self.training.install(find_parts(model), saved)

    def remove(self) -> None:
        """Take the rounding off."""
        self.training.remove()


def round_by_checkpoint(model: nn.Module, checkpoint: Mapping, hook: QuantizationHook) -> None:
    """Let a model compute in 8 bits, by the ranges that a checkpoint of its training has.

    Args:
        model (nn.Module): With the weights.
        checkpoint (Mapping): What is left of the file, as checkpointers give it.
        hook (QuantizationHook): Of the config.
    """
    saved = (checkpoint.get('trainer') or {}).get('hooks', {}).get(QuantizationHook.__name__)
    if saved is None:
        _log.warning('QuantizationHook: the checkpoint has no ranges: it is tested in float32')
        return
    hook.install(model, saved)
    hook.training.rest()


def _always_one_call(norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    """As the norm's own forward, which makes several calls where gradients are wanted: the plan of
    a pass would be another one."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _sum(values: Tensor) -> None:
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
