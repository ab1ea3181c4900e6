"""Train for integers of 8 bits: when, not what."""

from collections.abc import Callable, Iterator, Sequence

import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet.registry import HOOKS

from ..compression.quantization import Int8Simulation, Ranges, move_range
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
        if start < 0 or observe is not None and observe <= start:
            raise UsageError(
                f'QuantizationHook: start={start}, observe={observe}: start must not be negative, '
                'and observe be later'
            )
        if not 0 < noise <= 1:
            raise UsageError(
                f'QuantizationHook: noise={noise} is no share of the weights in (0, 1]'
            )
        if ranges not in ('running', 'learned') or not 0 < rate <= 0.1:
            raise UsageError(
                f"QuantizationHook: ranges='{ranges}', rate={rate}: ranges are 'running' or "
                "'learned', and their rate is in (0, 0.1]"
            )
        if not 0 <= float_share <= 1:
            raise UsageError(f'QuantizationHook: float_share={float_share} is no share in [0, 1]')
        self.start, self.observe, self.noise = start, observe, noise
        self.float_share = float_share
        self.learned, self.rate = ranges == 'learned', rate
        self.reduced_range = reduced_range
        self._parts: list = []
        self.simulations: dict[str, Int8Simulation] = {}

    def describe(self, runner: Runner) -> list[str]:
        """What it would do; raises what a training would."""
        self._require_fit(runner)
        names = ', '.join(part.name for part in find_parts(plain_model(runner)))
        bits = 7 if self.reduced_range else 8
        return [f'round to {bits} bits, after {self.start} {self.unit}: {names}']

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
        done = runner.epoch if self.by_epoch else runner.iter
        active, moving = done >= self.start, self.observe is None or done < self.observe
        learning = self.learned and active and moving
        self._set(active, moving and not learning, learning)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Agree with other ranks on observed ranges, or take a step with learned ones."""
        if any(simulation.ranges.observing for simulation in self.simulations.values()):
            self._agree()
        elif any(simulation.ranges.learning for simulation in self.simulations.values()):
            self._learn()

    def before_val(self, runner: Runner) -> None:
        """Round as a deployed detector does; ranges stay."""
        # A run that has trained nothing yet knows no ranges, and is tested in float.
        self._set(True, False)

    def before_test(self, runner: Runner) -> None:
        """Install the rounding by the checkpoint's ranges, if it has any."""
        if self._saved is not None and not self._parts:
            self._install(plain_model(runner))
            self._set(True, False)
        elif not self._parts:
            runner.logger.warning(
                'QuantizationHook: the checkpoint has no ranges: it is tested in float32'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add ranges and settings to the checkpoint."""
        checkpoint['quantization'] = dict(
            ranges={key: value.detach().cpu() for key, value in self._ranges().items()},
            reduced=self.reduced_range,
            float_share=self.float_share,
        )

    def after_train(self, runner: Runner) -> None:
        """Take the rounding off."""
        for part in self._parts:
            part.place(part.run)
        self._parts, self.simulations = [], {}

    after_test = after_train

    def _install(self, model: nn.Module) -> None:
        if can_fuse(model):
            raise UsageError(
                'QuantizationHook: parts of this detector are fused for use, as YOLOv5 and YOLOv7 '
                'have them, and would be others then; export it by tools/export.py --int8 as it is'
            )
        trained = self._saved or {}
        for name, value, trained_value in (
            ('reduced_range', self.reduced_range, trained.get('reduced')),
            ('float_share', self.float_share, trained.get('float_share')),
        ):
            if trained_value is not None and value != trained_value:
                raise UsageError(
                    f'QuantizationHook: {name}={value}, but the checkpoint was trained with '
                    f'{trained_value}'
                )
        self._parts = find_parts(model)
        for part in self._parts:
            simulation = Int8Simulation(
                part.run,
                part.modules,
                part.spared,
                self.reduced_range,
                self.noise,
                self.float_share if part.predicts else 0.0,
            )
            self.simulations[part.name] = simulation
            part.place(simulation)
        device = next(model.parameters()).device
        for key, value in trained.get('ranges', {}).items():
            name, _, range_key = key.partition('/')
            if name not in self.simulations:
                raise UsageError(
                    f"QuantizationHook: the checkpoint has ranges of '{name}', which this detector "
                    'has '
                    'not; --resume goes on with the same config'
                )
            self.simulations[name].ranges.values[range_key] = value.to(device)

    def _set(self, active: bool, observing: bool, learning: bool = False) -> None:
        for simulation in self.simulations.values():
            simulation.active = active
            simulation.ranges.observing, simulation.ranges.learning = observing, learning

    def _ranges(self) -> dict[str, Tensor]:
        return {
            f'{name}/{key}': value
            for name, simulation in self.simulations.items()
            for key, value in sorted(simulation.ranges.values.items())
        }

    def _agree(self) -> None:
        """The mean of the ranges over the ranks, which see other images."""
        if get_world_size() > 1:
            for ranges, key, value in self._means(self._keys(), lambda value: value):
                ranges.values[key] = value

    def _learn(self) -> None:
        """A step of descent; the gradient is the mean over the ranks, as of weights. What came into
        being on one rank alone, at a RoI head that had RoIs there alone, comes to all."""
        keys = self._keys()
        gradients = [
            *self._means(
                keys, lambda value: value.new_zeros(2) if value.grad is None else value.grad
            )
        ]
        for ranges, key, value in self._means(keys, lambda value: value):
            ranges.values[key] = value
        for ranges, key, gradient in gradients:
            ranges.values[key] = move_range(ranges.values[key], gradient, self.rate)

    def _keys(self) -> list[tuple[str, str]]:
        """Part and key of each range that any rank knows, the same on all: a rank may have come by
        a part that others have not, such as a RoI head that had no RoIs there."""
        known_here = [
            (name, key)
            for name, simulation in self.simulations.items()
            for key in simulation.ranges.values
        ]
        return sorted({tuple(pair) for pairs in all_gather_object(known_here) for pair in pairs})

    def _means(
        self, keys: Sequence[tuple[str, str]], of: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Ranges, str, Tensor]]:
        """The mean over the ranks of something of each range, of those ranks that know the range:
        ranges, key, (2, )."""
        named = [(self.simulations[name].ranges, key) for name, key in keys]
        if not named:
            return
        first = next(iter(self.simulations.values()))
        device = next(first.modules[0].parameters()).device
        empty = torch.full((2,), float('nan'), device=device)
        every = torch.stack(
            [
                of(ranges.values[key]).detach() if key in ranges.values else empty
                for ranges, key in named
            ]
        )
        known = every.isfinite().float()
        every = every.nan_to_num()
        all_reduce(every)
        all_reduce(known)
        means = every / known.clamp(min=1)
        # One look for all of them.
        for (ranges, key), mean, count in zip(named, means, known[:, 0].tolist()):
            if count > 0:
                yield ranges, key, mean
