"""What a budget served: how many images left at each exit, what that costs, and whether chance
explains the difference from what was wanted."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import betabinom

from .budget import Budget
from .thresholds import ALL_EASY, ALL_HARD, mean_of_shares, wanted_shares

#: Of tests on images like the calibration's, the share that is doubted all the same.
DOUBTED = 0.01
#: A clock that shows this many times the wanted latency is worth a line.
_SLOW = 1.1


@dataclass(frozen=True)
class BudgetReport:
    """What became of a budget on some images. Made by `report_budget`.

    Attributes:
        counts (tuple[int, ...]): Images that left at each exit, (K,).
        budget (Budget, optional): As it was asked for; None for a checkpoint's own thresholds.
        wanted (tuple[float, ...], optional): Share of the images that was wanted at each exit,
            (K,). None where thresholds were asked for, nothing is calibrated, or a controller moves
            the share.
        calibrated (tuple[int, ...], optional): The calibration's images at each exit by the same
            thresholds, (K,). None without a calibration, or where a controller moves the
            thresholds.
        gflops, latencies (tuple[float, ...]): Of an image at each exit, (K,), GFLOPs and seconds;
            NaN where they were not measured.
        seconds (float, optional): Mean per image, by the clock.
        online (bool): Whether a controller moved the thresholds.
    """

    counts: tuple[int, ...]
    budget: Budget | None = None
    wanted: tuple[float, ...] | None = None
    calibrated: tuple[int, ...] | None = None
    gflops: tuple[float, ...] = (math.nan,)
    latencies: tuple[float, ...] = (math.nan,)
    seconds: float | None = None
    online: bool = False

    @property
    def images(self) -> int:
        """How many images there were."""
        return sum(self.counts)

    @property
    def shares(self) -> list[float]:
        """Of the images, at each exit, (K,)."""
        return [count / max(1, self.images) for count in self.counts]

    @property
    def mean_gflops(self) -> float:
        """Per image; NaN where GFLOPs were not measured."""
        return mean_of_shares(self.shares, self.gflops)

    @property
    def mean_latency(self) -> float:
        """Seconds per image: the exits' own latencies, by the served shares; NaN where they were
        not measured."""
        return mean_of_shares(self.shares, self.latencies)

    def lines(self) -> list[str]:
        """What was wanted and served, and what an image costs: one or two lines."""
        if not self.images:
            return []
        return [self._shares_line(), *self._costs_line()]

    def _shares_line(self) -> str:
        known = self.wanted
        origin = 'wanted'
        if known is None and self.calibrated is not None:
            known, origin = _shares_of(self.calibrated), "of the calibration's images"
        if len(self.counts) == 2:
            before = '' if known is None else f'{known[1]:.1%} {origin}, '
            served = f'{self.shares[1]:.1%} served ({self.counts[1]} of {self.images} images)'
            return f'hard: {before}{served}'
        before = '' if known is None else f'{_percents(known)} {origin}, '
        exits = ' / '.join(map(str, range(len(self.counts))))
        counts = ' / '.join(map(str, self.counts))
        served = f'{_percents(self.shares)} served ({counts} of {self.images} images)'
        return f'exits {exits}: {before}{served}'

    def _costs_line(self) -> list[str]:
        parts = []
        kind = self.budget and self.budget.kind
        if kind == 'target_gflops':
            parts.append(f'{self.budget.value:.3g} GFLOPs wanted')
        if math.isfinite(self.mean_gflops):
            parts.append(f'{self.mean_gflops:.3g} GFLOPs')
        if kind == 'target_latency':
            parts.append(f'{1e3 * self.budget.value:.1f} ms wanted')
        if math.isfinite(self.mean_latency):
            parts.append(f"{1e3 * self.mean_latency:.1f} ms by the exits' own latencies")
        if self.seconds is not None:
            parts.append(f'{1e3 * self.seconds:.1f} ms by the clock')
        return [f'per image: {", ".join(parts)}'] if parts else []

    def doubts(self) -> list[str]:
        """Where the budget was missed by more than chance explains, and what to do: a sentence
        each."""
        return [*self._share_doubt(), *self._clock_doubt()]

    def _share_doubt(self) -> list[str]:
        # Who asks for a threshold has it.
        if self.calibrated is None or not self.images or _asks_for_threshold(self.budget):
            return []
        misses = exits_off_budget(self.counts, self.calibrated)
        if not misses:
            return []
        exit, (low, high) = max(
            misses.items(),
            key=lambda miss: abs(self.shares[miss[0]] - _shares_of(self.calibrated)[miss[0]]),
        )
        wanted = (self.wanted or _shares_of(self.calibrated))[exit]
        where = 'are hard' if len(self.counts) == 2 else f'left at exit {exit}'
        return [
            f'{self.shares[exit]:.1%} of these {self.images} images {where}, and {wanted:.1%} were '
            f'wanted; chance explains {low:.1%} to {high:.1%}. They differ from the '
            f'{sum(self.calibrated)} images of the calibration: calibrate on images like these, or '
            'hold the budget online'
        ]

    def _clock_doubt(self) -> list[str]:
        # A controller says itself what is out of its reach.
        if self.online or self.seconds is None or self.budget is None:
            return []
        target = self.budget.value
        if self.budget.kind != 'target_latency' or self.seconds <= _SLOW * target:
            return []
        return [
            f'an image took {1e3 * self.seconds:.1f} ms, and {1e3 * target:.1f} ms were wanted. '
            'Latencies are measured one image at a time: calibrate on a machine as loaded as this '
            'one, or hold the budget online'
        ]

    def figures(self) -> dict[str, float]:
        """Numbers of `lines` by name, for logs and files; what is not known is left out."""
        if not self.images:
            return {}
        figures = {f'exit{exit}_share': share for exit, share in enumerate(self.shares)}
        figures.update(
            {f'exit{exit}_wanted': share for exit, share in enumerate(self.wanted or ())}
        )
        figures.update(gflops=self.mean_gflops, milliseconds=1e3 * self.mean_latency)
        if self.seconds is not None:
            figures['clock_milliseconds'] = 1e3 * self.seconds
        return {name: value for name, value in figures.items() if math.isfinite(value)}


def report_budget(
    counts: Sequence[int],
    budget: Budget | Mapping | None = None,
    thresholds: Sequence[float] | None = None,
    difficulties: Sequence[float] = (),
    latencies: Sequence[float] = (),
    gflops: Sequence[float] = (),
    seconds: float | None = None,
) -> BudgetReport:
    """Compare what was served with what was wanted.

    Args:
        counts (Sequence[int]): Images that left at each exit, (K,).
        budget (Budget or Mapping, optional): That was asked for.
        thresholds (Sequence[float], optional): By which images left, (K - 1,); None where a
            controller moves them.
        difficulties (Sequence[float]): The calibration's; none without.
        latencies, gflops (Sequence[float]): The calibration's, (K,); NaN or none where they were
            not measured.
        seconds (float, optional): Mean per image by the clock.
    """
    budget, exits = Budget.parse(budget), len(counts)
    calibrated = None
    by_threshold = _asks_for_threshold(budget)
    forced = by_threshold and {*(thresholds or ())} <= {ALL_HARD, ALL_EASY}
    if thresholds is not None and len(difficulties) and not forced:
        left = np.searchsorted(
            np.asarray(thresholds, np.float32), np.asarray(difficulties, np.float32)
        )
        calibrated = tuple(np.bincount(left, minlength=exits).tolist())
    wanted = None
    asks_for_share = budget is not None and budget.kind == 'hard_share'
    if asks_for_share or calibrated is not None and not by_threshold:
        # What there was to say of the target was said when it was set.
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            wanted = (
                wanted_shares(budget, exits, latencies, gflops)
                if budget
                else _shares_of(calibrated)
            )
    return BudgetReport(
        tuple(counts),
        budget,
        wanted and tuple(wanted),
        calibrated,
        tuple(gflops) or (math.nan,) * exits,
        tuple(latencies) or (math.nan,) * exits,
        seconds,
        thresholds is None,
    )


def exits_off_budget(
    counts: Sequence[int], calibrated: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Exits whose share of the images is further from the calibration's than chance explains.

    Args:
        counts (Sequence[int]): Images at each exit, (K,).
        calibrated (Sequence[int]): The calibration's images at each exit, (K,), by the same
            thresholds.

    Returns:
        dict[int, tuple[float, float]]: Exit -> the shares that chance explains. Of two exits the
            second alone; of more each has its part of `DOUBTED`.
    """
    exits = range(1, 2) if len(counts) == 2 else range(len(counts))
    misses = {}
    for exit in exits:
        low, high = share_prediction_interval(
            calibrated[exit], sum(calibrated), sum(counts), DOUBTED / len(exits)
        )
        if not low <= counts[exit] / sum(counts) <= high:
            misses[exit] = low, high
    return misses


def share_prediction_interval(
    inside: int, calibrated: int, images: int, doubted: float = DOUBTED
) -> tuple[float, float]:
    """Where a share will lie on new images, if they are drawn like those of the calibration.

    Thresholds lie halfway between two of the calibration's difficulties, ``inside`` of n in all. Of
    the images in the world the share between them is then ``Beta(inside + 1/2, n - inside + 1/2)``,
    whatever the difficulties' distribution; and of m new images the number is beta-binomial: it
    counts what is uncertain of both sets.

    Args:
        inside (int): Images of the calibration at the exit.
        calibrated (int): n, images of the calibration.
        images (int): m, new images.
        doubted (float): Chance that the share is outside the interval, both sides together.
            Defaults to 0.01.

    Returns:
        tuple[float, float]: Ends of the interval, shares.
    """
    chances = betabinom.pmf(
        np.arange(images + 1), images, inside + 0.5, calibrated - inside + 0.5
    ).cumsum()
    low, high = np.searchsorted(chances, (doubted / 2, 1 - doubted / 2))
    return float(low) / images, float(min(high, images)) / images


def _asks_for_threshold(budget: Budget | None) -> bool:
    return budget is not None and budget.kind == 'threshold'


def _shares_of(counts: Sequence[int]) -> tuple[float, ...]:
    return tuple(count / sum(counts) for count in counts)


def _percents(shares: Sequence[float]) -> str:
    return ' / '.join(f'{100 * share:.1f}' for share in shares) + ' %'
