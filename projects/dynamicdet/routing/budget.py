"""The wanted speed of a detector, as one number of one kind."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError

#: Each kind of budget and its range. Targets are above 0 and finite.
_RANGES = dict(
    threshold=(-1, 1), hard_share=(0, 1), target_latency=(0, math.inf), target_gflops=(0, math.inf)
)
#: What `Budget.parse` takes by name.
BUDGET_NAMES = (*_RANGES, 'throughput')


@dataclass(frozen=True)
class Budget:
    """The wanted speed: a number and what it measures.

    ==================  ===========  ==============================================================
    kind                value        meaning
    ==================  ===========  ==============================================================
    ``threshold``       in [-1, 1]   images are hard when their difficulty is above it
    ``hard_share``      in [0, 1]    share of the images that are hard
    ``target_latency``  above 0      mean seconds per image
    ``target_gflops``   above 0      mean GFLOPs per image, 2 x multiply-adds
    ==================  ===========  ==============================================================

    Args:
        kind (str): One of the four.
        value (float or Sequence[float]): The number. A threshold, or a hard share, may be given
            exit by exit, as a list.

    Raises:
        UsageError: If the kind is unknown or the value is out of its range.

    Example:
        >>> Budget('hard_share', 0.5)
        >>> Budget.parse(dict(throughput=50))
        Budget(kind='target_latency', value=0.02)
    """

    kind: str
    value: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in _RANGES:
            raise UsageError(f"a budget is one of {', '.join(_RANGES)}; got '{self.kind}'")
        low, high = _RANGES[self.kind]
        by_exit = not self.is_target and isinstance(self.value, (list, tuple))
        for number in self.value if by_exit else [self.value]:
            real = isinstance(number, numbers.Real) and not isinstance(number, bool)
            # Not `number < low`, which lets NaN pass.
            if self.is_target and not (real and low < number < high):
                raise UsageError(f'{self.kind} must be a number above 0, got {self.value}')
            if not (real and low <= number <= high):
                raise UsageError(
                    f'{self.kind} must be a number in [{low}, {high}], got {self.value}'
                )
        if by_exit:
            object.__setattr__(self, 'value', tuple(self.value))

    @classmethod
    def parse(
        cls,
        budget: 'Budget | Mapping[str, float | Sequence[float]] | None' = None,
        **named: float | Sequence[float] | None,
    ) -> 'Budget | None':
        """Read a budget as configs, command lines and keyword arguments give it.

        Args:
            budget (Budget or Mapping, optional): ``dict(hard_share=0.5)``, for example. Entries of
                None count as left out. Beside the four kinds, ``throughput``, images per second,
                is a target latency of ``1 / throughput``.
            **named: The same as keyword arguments: ``hard_share=0.5``.

        Returns:
            Budget, optional: None where nothing is given.

        Raises:
            UsageError: If more than one number is given, or one that is out of range.
        """
        if isinstance(budget, cls):
            budget = budget.as_dict()
        asked = [
            (name, value)
            for source in (budget or {}, named)
            for name, value in source.items()
            if value is not None
        ]
        if not asked:
            return None
        if len(asked) > 1 or asked[0][0] not in BUDGET_NAMES:
            numbers_given = ', '.join(f'{name}={value}' for name, value in asked)
            raise UsageError(
                f'a budget is exactly one of {", ".join(BUDGET_NAMES)}; got {numbers_given}'
            )
        ((name, value),) = asked
        if name == 'throughput':
            return cls('target_latency', _latency_of(value))
        return cls(name, value)

    @property
    def is_target(self) -> bool:
        """Whether it is a mean cost per image, in seconds or GFLOPs."""
        return self.kind.startswith('target')

    def as_dict(self) -> dict[str, float | list[float]]:
        """As configs have it: ``{kind: value}``."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {self.kind: value}


def _latency_of(throughput: float) -> float:
    """Seconds per image of images per second."""
    real = isinstance(throughput, numbers.Real) and not isinstance(throughput, bool)
    if not (real and 0 < throughput < math.inf and math.isfinite(1 / throughput)):
        raise UsageError(
            f'throughput is in images per second and must be above 0, got {throughput}'
        )
    return 1 / throughput
