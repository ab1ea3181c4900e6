"""Parts of a detector that compute in 8 bits while it is trained: what, not when."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .quantization import Int8Simulation, Ranges, move_range


class Ranks(NamedTuple):
    """How the processes of a training talk, in the words of its framework.

    Attributes:
        count (int): How many there are.
        gather (Callable): What this one has, any object -> a list of what all have.
        sum (Callable): Sums a tensor over all, in place.
    """

    count: int
    gather: Callable[[Any], list]
    sum: Callable[[Tensor], Any]


class QuantizedTraining:
    """The rounding of a detector that gets used to 8 bits, and the ranges of its activations.

    Args:
        start (int): Steps done before weights and activations are rounded. Until then ranges are
            watched.
        observe (int, optional): Steps done when ranges come to rest. By default they follow the
            activations to the end.
        noise (float): Share of the weights, by chance, that is rounded in a pass: quant-noise (Fan
            et al. 2021). In (0, 1]; 1 rounds all.
        reduced_range (bool): Whether weights have 7 bits, for x86 processors without VNNI.
        ranges (str): ``running``: they follow the activations. ``learned``: from ``start`` on they
            are trained with the weights, by gradients (`quantization.LearnedRange`).
        rate (float): Share of its width by which an end of a learned range moves in an iteration.
            In (0, 0.1].
        float_share (float): What layers that give predictions may be of a part's multiply-adds to
            stay float. In [0, 1]; 0 quantizes all.

    Attributes:
        simulations (dict[str, Int8Simulation]): Of each part, by name, once installed.

    Raises:
        UsageError: If a number is out of range.
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
        self.simulations: dict[str, Int8Simulation] = {}
        self._parts: list = []

    @property
    def installed(self) -> bool:
        """Whether parts compute with it."""
        return bool(self._parts)

    def install(self, parts: Sequence, saved: Mapping | None = None) -> None:
        """Put the rounding in the place of a detector's parts.

        Args:
            parts (Sequence[DetectorPart]): See `cascade.parts`.
            saved (Mapping, optional): What `state` gave, of a training before.

        Raises:
            UsageError: If that was of other settings or another detector.
        """
        trained = saved or {}
        for name, value, trained_value in (
            ('reduced_range', self.reduced_range, trained.get('reduced')),
            ('float_share', self.float_share, trained.get('float_share')),
        ):
            if trained_value is not None and value != trained_value:
                raise UsageError(
                    f'QuantizationHook: {name}={value}, but the checkpoint was trained with '
                    f'{trained_value}'
                )
        self._parts = list(parts)
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
        for key, value in trained.get('ranges', {}).items():
            name, _, range_key = key.partition('/')
            if name not in self.simulations:
                raise UsageError(
                    f"QuantizationHook: the checkpoint has ranges of '{name}', which this detector "
                    'has not; --resume goes on with the same config'
                )
            self.simulations[name].ranges.values[range_key] = value.to(self._device)

    def remove(self) -> None:
        """Take the rounding off."""
        for part in self._parts:
            part.place(part.run)
        self._parts, self.simulations = [], {}

    def begin_step(self, done: int) -> None:
        """Round from ``start`` on; observe or learn ranges until ``observe``, then keep them.

        Args:
            done (int): Steps done so far.
        """
        active, moving = done >= self.start, self.observe is None or done < self.observe
        learning = self.learned and active and moving
        self._set(active, moving and not learning, learning)

    def finish_step(self, ranks: Ranks) -> None:
        """Agree with other ranks on observed ranges, or take a step with learned ones."""
        if any(simulation.ranges.observing for simulation in self.simulations.values()):
            self._agree(ranks)
        elif any(simulation.ranges.learning for simulation in self.simulations.values()):
            self._learn(ranks)

    def rest(self) -> None:
        """Round as a deployed detector does; ranges stay."""
        # A run that has trained nothing yet knows no ranges, and is tested in float.
        self._set(True, False)

    def state(self) -> dict:
        """Ranges and settings, for a checkpoint."""
        ranges = {
            f'{name}/{key}': value.detach().cpu()
            for name, simulation in self.simulations.items()
            for key, value in sorted(simulation.ranges.values.items())
        }
        return dict(ranges=ranges, reduced=self.reduced_range, float_share=self.float_share)

    @property
    def _device(self) -> torch.device:
        first = next(iter(self.simulations.values()))
        return next(first.modules[0].parameters()).device

    def _set(self, active: bool, observing: bool, learning: bool = False) -> None:
        for simulation in self.simulations.values():
            simulation.active = active
            simulation.ranges.observing, simulation.ranges.learning = observing, learning

    def _agree(self, ranks: Ranks) -> None:
        """The mean of the ranges over the ranks, which see other images."""
        if ranks.count > 1:
            for ranges, key, value in self._means(ranks, self._keys(ranks), lambda value: value):
                ranges.values[key] = value

    def _learn(self, ranks: Ranks) -> None:
        """A step of descent; the gradient is the mean over the ranks, as of weights. What came into
        being on one rank alone, at a RoI head that had RoIs there alone, comes to all."""
        keys = self._keys(ranks)
        gradients = [
            *self._means(
                ranks, keys, lambda value: value.new_zeros(2) if value.grad is None else value.grad
            )
        ]
        for ranges, key, value in self._means(ranks, keys, lambda value: value):
            ranges.values[key] = value
        for ranges, key, gradient in gradients:
            ranges.values[key] = move_range(ranges.values[key], gradient, self.rate)

    def _keys(self, ranks: Ranks) -> list[tuple[str, str]]:
        """Part and key of each range that any rank knows, the same on all: a rank may have come by
        a part that others have not, such as a RoI head that had no RoIs there."""
        known_here = [
            (name, key)
            for name, simulation in self.simulations.items()
            for key in simulation.ranges.values
        ]
        return sorted({tuple(pair) for pairs in ranks.gather(known_here) for pair in pairs})

    def _means(
        self, ranks: Ranks, keys: Sequence[tuple[str, str]], of: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Ranges, str, Tensor]]:
        """The mean over the ranks of something of each range, of those ranks that know the range:
        ranges, key, (2, )."""
        named = [(self.simulations[name].ranges, key) for name, key in keys]
        if not named:
            return
        empty = torch.full((2,), float('nan'), device=self._device)
        every = torch.stack(
            [
                of(ranges.values[key]).detach() if key in ranges.values else empty
                for ranges, key in named
            ]
        )
        known = every.isfinite().float()
        every = every.nan_to_num()
        ranks.sum(every)
        ranks.sum(known)
        means = every / known.clamp(min=1)
        # One look for all of them.
        for (ranges, key), mean, count in zip(named, means, known[:, 0].tolist()):
            if count > 0:
                yield ranges, key, mean
