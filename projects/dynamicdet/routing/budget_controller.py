"""Hold a budget on a stream whose images grow harder or easier, and on a machine whose speed
changes.

Letters: ``share`` is the hard share that is aimed at, in [0, 1]; ``costs`` what each of the K exits
costs per image; ``span`` the cost of the last exit minus that of the first; ``gain`` the share that
one image moves whose cost misses the target by a whole span.
"""

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UsageError
from .budget import Budget
from .thresholds import Thresholds, share_for_gflops, share_for_latency, thresholds_for_share

#: A single measurement counts as no more spans than this above or below the target: a machine that
#: was suspended, or a first call that compiles, moves the share by a little, not to its end.
_MOST_SPANS = 3.0
#: The most that one call moves the share, per span of error. An integrator of one step is stable
#: below 2; a quarter leaves room for a load that multiplies the span.
_MOST_STEP = 0.5

_UNITS = dict(
    target_latency='{:.4g} s per image',
    hard_share='a hard share of {:.3g}',
    target_gflops='{:.4g} GFLOPs per image',
)


class BudgetController:
    """An online budget: thresholds from the difficulties of the last images, corrected by what
    images cost.

    Two parts. The threshold is the quantile of the last ``window`` difficulties that gives the
    current hard share, so it follows a drift of the difficulties within half a window. The share
    itself is an integral:

        share <- share + gain * images * (target - cost) / span, kept in [0, 1]

    It stops at its ends (no wind-up), so it turns back with the first image that costs less or
    more. And it bounds the error: away from the ends, what all images of any stretch cost above the
    target is what the share lost in it times ``span / gain``. So a running mean over W images is
    off by at most ``span / (gain * W)`` times the change of the share over those W images.

    ``decide`` is called with the difficulties of each batch and gives its threshold; for a latency
    or a throughput ``measure`` is called with the seconds that images took, as they become known.
    Memory: one float per image of the window. Not for several threads at once.

    Args:
        budget (Budget or Mapping): One number, and no threshold; see `Budget.parse`. GFLOPs take
            ``costs``.
        costs (Sequence[float], optional): Seconds, or GFLOPs, of each exit, (K,), rising: a
            calibration's. A latency needs none: it then starts at half hard, and takes the target
            for the span.
        difficulties (Sequence[float], optional): A calibration's, to start from. Without, the first
            batch is all that is known of the first threshold.
        exits (int): K. Defaults to 2.
        window (int): How many images the threshold is taken from, and the time constant of
            ``mean``. Defaults to 256.
        gain (float): In (0, 0.1]. ``1 / gain`` is the time constant in images. The share trembles
            by about ``sqrt(gain / 8)`` at half hard, 0.035 at the default. Defaults to 0.01.

    Attributes:
        share (float): The hard share aimed at.
        threshold (float or list[float]): As last decided.
        mean (float): Mean cost per image, forgotten exponentially over ``window`` images; NaN
            before the first.
        ignored (int): How many difficulties and measurements were no usable numbers.

    Raises:
        UsageError: If an argument is out of range or missing.

    Example:
        >>> controller = BudgetController(dict(target_latency=0.03))
        >>> threshold = controller.decide([0.2, 0.7, 0.4])
        >>> controller.measure(seconds=0.09, images=3)
    """

    def __init__(
        self,
        budget: Budget | Mapping[str, float],
        costs: Sequence[float] | None = None,
        difficulties: Sequence[float] | None = None,
        exits: int = 2,
        window: int = 256,
        gain: float = 0.01,
    ) -> None:
        self.budget = _require_one_number(Budget.parse(budget))
        self.target = float(self.budget.value)
        self.exits = len(costs) if costs is not None else exits
        if self.exits < 2:
            raise UsageError(f'a controller chooses between two exits or more, got {self.exits}')
        if not isinstance(window, int) or window < 1 or not 0 < gain <= 0.1:
            raise UsageError(
                f'window must be an integer of 1 or more and gain in (0, 0.1]; got {window} and '
                f'{gain}'
            )
        self.window, self.gain = window, gain
        self._costs = self._known_costs(costs)
        self.span = self.target if self._costs is None else self._costs[-1] - self._costs[0]
        self.share = self._first_share()
        self.mean, self.ignored, self._pinned, self._told = math.nan, 0, 0, False
        self._recent = deque(_thin(difficulties, window), maxlen=window)
        self.threshold: Thresholds = self._quantile() if self._recent else _middle(self.exits)

    def _known_costs(self, costs: Sequence[float] | None) -> np.ndarray | None:
        if self.budget.kind == 'hard_share':
            # A share is a cost, too: nothing at the first exit, one at the last.
            return np.arange(self.exits) / (self.exits - 1)
        if costs is None:
            if self.budget.kind == 'target_gflops':
                raise UsageError(
                    'target_gflops needs the GFLOPs of each exit: calibrate, or give costs'
                )
            return None
        costs = np.asarray(costs, float)
        if not np.isfinite(costs).all() or not costs[0] > 0 or not costs[0] < costs[-1]:
            raise UsageError(
                'costs must be finite, above 0, the last exit the dearest: measure them again on '
                f'a quiet machine; got {costs.tolist()}'
            )
        return costs

    def _first_share(self) -> float:
        if self._costs is None:
            return 0.5
        if self.budget.kind == 'hard_share':
            return self.target
        convert = share_for_gflops if self.budget.kind == 'target_gflops' else share_for_latency
        within = float(np.clip(self.target, self._costs[0], self._costs[-1]))
        if within != self.target:
            warnings.warn(
                f'{_UNITS[self.budget.kind].format(self.target)} is outside what the exits were '
                f'calibrated to, {self._costs[0]:.4g} to {self._costs[-1]:.4g}: it may be out of '
                'reach'
            )
        return convert(within, *self._costs.tolist())

    @property
    def measures(self) -> bool:
        """Whether it wants to be told how long images take: those of a latency and a throughput
        do."""
        return self.budget.kind == 'target_latency'

    def decide(self, difficulties: Sequence[float]) -> Thresholds:
        """Take the difficulties of a batch, and say its threshold.

        Args:
            difficulties (Sequence[float]): (n,), in the order of arrival. What is not in [0, 1] is
                ignored.

        Returns:
            float or list[float]: The threshold of two exits, or the K - 1 of more, for these
                images.
        """
        scores = np.asarray(difficulties, np.float32).reshape(-1)
        # Not `scores < 0 or ...`, which lets NaN pass.
        usable = scores[(scores >= 0) & (scores <= 1)]
        self.ignored += len(scores) - len(usable)
        if len(usable):
            self._recent.extend(usable.tolist())
            self.threshold = self._quantile()
            if not self.measures:
                taken = (usable[:, None] > np.atleast_1d(np.float32(self.threshold))).sum(1)
                self._correct(float(self._costs[taken].mean()), len(usable))
        return self.threshold

    def measure(self, seconds: float, images: int = 1) -> None:
        """Take how long images took, all together. What is no finite number above 0 is ignored.

        Args:
            seconds (float): Of all of them.
            images (int): How many.
        """
        if not self.measures:
            return
        if not (_is_number(seconds) and math.isfinite(seconds) and seconds > 0 and images > 0):
            self.ignored += 1
            return
        # Not numpy's: a state is plain numbers.
        self._correct(float(seconds / images), int(images))

    def _quantile(self) -> Thresholds:
        return thresholds_for_share(list(self._recent), self.share, self.exits)

    def _correct(self, cost: float, images: int) -> None:
        """The integral: move the share by what a mean cost of some images misses the target."""
        kept = math.exp(-images / self.window)
        self.mean = cost if math.isnan(self.mean) else kept * self.mean + (1 - kept) * cost
        missed = min(max((self.target - cost) / self.span, -_MOST_SPANS), _MOST_SPANS)
        wanted = self.share + min(self.gain * images, _MOST_STEP) * missed
        self.share = min(max(wanted, 0.0), 1.0)
        self._watch(wanted != self.share, images)

    def _watch(self, pinned: bool, images: int) -> None:
        """Say once when the target is out of reach, and be ready to say it again after it was in
        reach."""
        self._pinned = self._pinned + images if pinned else 0
        if self.fault and not self._told:
            warnings.warn(self.fault)
        self._told = self.fault is not None

    @property
    def fault(self) -> str | None:
        """Why the target is not met, in one line; None while it is in reach.

        It is out of reach when the share has stood at an end for a whole window. Being cheaper than
        the target with every image at the last exit counts as well.
        """
        if self._pinned < self.window:
            return None
        end = 'first' if self.share == 0 else 'last'
        return (
            f'{_UNITS[self.budget.kind].format(self.target)} is out of reach: the mean is '
            f'{_UNITS[self.budget.kind].format(self.mean)} with every image at the {end} exit'
        )

    def status(self) -> dict[str, object]:
        """What a server may want to log: plain numbers and ``fault``."""
        return dict(
            target=self.target,
            mean=self.mean,
            share=float(self.share),
            threshold=self.threshold,
            images=len(self._recent),
            ignored=self.ignored,
            fault=self.fault,
        )

    def state_dict(self) -> dict[str, object]:
        """All that changes with the stream, as plain numbers and lists: JSON holds it."""
        return dict(
            share=self.share,
            threshold=self.threshold,
            recent=list(self._recent),
            mean=None if math.isnan(self.mean) else self.mean,
            ignored=self.ignored,
            pinned=self._pinned,
        )

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where another controller was. Its target, window and gain are this one's.

        Raises:
            UsageError: If this is no state of a controller of as many exits.
        """
        try:
            share, mean = float(state['share']), state['mean']
            recent = [float(difficulty) for difficulty in state['recent']]
            threshold, ignored, pinned = (
                state['threshold'],
                int(state['ignored']),
                int(state['pinned']),
            )
            fits = (
                0 <= share <= 1
                and all(0 <= difficulty <= 1 for difficulty in recent)
                and np.size(threshold) == self.exits - 1
                and np.isfinite(threshold).all()
                and (mean is None or math.isfinite(mean))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f'this is no state of a controller: {type(error).__name__}: {error}'
            ) from error
        if not fits:
            raise UsageError(f'this is no state of a controller of {self.exits} exits')
        self.share, self.threshold, self.ignored, self._pinned = share, threshold, ignored, pinned
        self.mean = math.nan if mean is None else mean
        self._recent = deque(recent, maxlen=self.window)
        self._told = self.fault is not None


def _require_one_number(budget: Budget | None) -> Budget:
    """A budget that a controller can hold."""
    if budget is None or budget.kind == 'threshold' or isinstance(budget.value, tuple):
        raise UsageError(
            'a controller holds one of target_latency, throughput, hard_share and target_gflops, '
            f'one number; got {budget and budget.as_dict()}'
        )
    return budget


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _thin(difficulties: Sequence[float] | None, count: int) -> list:
    """At most so many quantiles of a calibration's difficulties."""
    if difficulties is None or not len(difficulties):
        return []
    scores = np.sort(np.asarray(difficulties, np.float32))
    if not (scores[0] >= 0 and scores[-1] <= 1):
        raise UsageError('some difficulties are not in [0, 1]: was the router trained?')
    at = (np.arange(min(count, len(scores))) + 0.5) * len(scores) / min(count, len(scores))
    return scores[at.astype(int)].tolist()


def _middle(exits: int) -> Thresholds:
    """Before anything is known."""
    return 0.5 if exits == 2 else [0.5] * (exits - 1)
