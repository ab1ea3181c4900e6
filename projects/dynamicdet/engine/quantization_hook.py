"""Train for integers of 8 bits: when, not what."""

from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.runner import Runner
from torch import nn

from mmdet.registry import HOOKS

from ..compression.quantization import Int8Simulation
from ..compression.quantized_training import QuantizedTraining, Ranks
from ..errors import UsageError
from ..models import can_fuse
from ..models.detector_parts import find_parts
from ..private_mmengine import resumes
from .compression_hook import CompressionHook, plain_model


@HOOKS.register_module()
class QuantizationHook(CompressionHook):
    """Let a trained detector get used to 8 bits: quantization-aware training.

    From ``start`` on, parts compute as their int8 graphs will: weights and activations are
    rounded, gradients pass. Norms stay as they are, in eval mode, since graphs have them in their
    convolutions. Validation, and tests of the run's checkpoints with the same config, are in 8 bits
    too.

    Checkpoints hold the detector's ordinary keys, in float32; the ranges of activations lie beside
    them under ``quantization``, for ``--resume`` and for ``tools/export.py --int8``, which takes
    them.

    Args:
        start (int): Epochs, or iterations, done before weights and activations are rounded. Until
            then ranges are watched.
        observe (int, optional): Epochs, or iterations, done when ranges come to rest. By default
            they follow the activations to the end.
        noise (float): Share of the weights, by chance, that is rounded in a pass: quant-noise (Fan
            et al. 2021). In (0, 1]; 1 rounds all.
        reduced_range (bool): Whether weights have 7 bits, for x86 processors without VNNI.
        by_epoch (bool): Whether these count epochs.
        ranges (str): ``running``: they follow the activations. ``learned``: from ``start`` on they
            are trained with the weights, by gradients (`quantization.LearnedRange`).
        rate (float): Share of its width by which an end of a learned range moves in an iteration.
            In (0, 0.1].
        float_share (float): What layers that give predictions may be of a part's multiply-adds to
            stay float, as they do in ``tools/export.py --int8``. In [0, 1]; 0 quantizes all.
    """

    # After EMAHook, which must copy the detector before its parts are replaced, and whose averages
    # are tested.
    priority = 'BELOW_NORMAL'
    state_name, verb = 'quantization', 'quantize'

    def __init__(
        self,
        start: int = 0,
        observe: int | None = None,
        noise: float = 1.0,
        reduced_range: bool = False,
        by_epoch: bool = True,
        ranges: str = 'running',
        rate: float = 0.001,
        float_share: float = 0.1,
    ) -> None:
        super().__init__(by_epoch)
        self.training = QuantizedTraining(
            start, observe, noise, reduced_range, ranges, rate, float_share
        )

    @property
    def simulations(self) -> dict[str, Int8Simulation]:
        """Of each part, by name, while they round."""
        return self.training.simulations

    def describe(self, runner: Runner) -> list[str]:
        """What it would do; raises what a training would."""
        self._require_fit(runner)
        names = ', '.join(part.name for part in find_parts(plain_model(runner)))
        bits = 7 if self.training.reduced_range else 8
        return [f'round to {bits} bits, after {self.training.start} {self.unit}: {names}']

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the ranges that the checkpoint has."""
        # Not of a resumed run alone: a test rounds by them.
        self._saved = checkpoint.get(self.state_name)

    def before_train(self, runner: Runner) -> None:
        """Check the run, find the layers and install the rounding."""
        self._require_fit(runner)
        if not resumes(runner):
            self._saved = None
        self._install(plain_model(runner))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Round from ``start`` on; observe or learn ranges until ``observe``, then keep them."""
        self.training.begin_step(runner.epoch if self.by_epoch else runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Agree with other ranks on observed ranges, or take a step with learned ones."""
        self.training.finish_step(Ranks(get_world_size(), all_gather_object, all_reduce))

    def before_val(self, runner: Runner) -> None:
        """Round as a deployed detector does; ranges stay."""
        self.training.rest()

    def before_test(self, runner: Runner) -> None:
        """Install the rounding by the checkpoint's ranges, if it has any."""
        if self._saved is not None and not self.training.installed:
            self._install(plain_model(runner))
            self.training.rest()
        elif not self.training.installed:
            runner.logger.warning(
                'QuantizationHook: the checkpoint has no ranges: it is tested in float32'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add ranges and settings to the checkpoint."""
        checkpoint['quantization'] = self.training.state()

    def after_train(self, runner: Runner) -> None:
        """Take the rounding off."""
        self.training.remove()

    after_test = after_train

    def _install(self, model: nn.Module) -> None:
        if can_fuse(model):
            raise UsageError(
                'QuantizationHook: parts of this detector are fused for use, as YOLOv5 and YOLOv7 '
                'have them, and would be others then; export it by tools/export.py --int8 as it is'
            )
        self.training.install(find_parts(model), self._saved)
