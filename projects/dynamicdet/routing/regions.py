"""Where a second look pays: rectangles of an image, chosen by what they bring over what they cost.

An image, as its network sees it, is a grid of cells of `CELL` pixels. A map says how much each cell
gains by a second look, a price what a cell must gain to be worth it. The whole image is one of the
rectangles, so that routing by image is a special case.

Letters: ``h``, ``w``: rows and columns of the grid. ``n``: images.

* A *rectangle* is (top, left, bottom, right) in cells, the last two excluded.
* Its *halo* is what is looked at around it, so that objects at its edge are seen whole; it costs as
  much and gains nothing. With a *step* it grows until its sides are multiples of that many cells,
  or the image's: then few sizes occur.
* A *price* is in units of gain per cell, from 0 (everything is looked at) to infinity (nothing is).
  As a number in [0, 1], like a difficulty's threshold, it is `threshold_of_price`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .region_tree import RegionTree, lengths_with_halo

#: Sides of a cell in pixels: the stride of the deepest map of all but a few detectors, so that a
#: crop along cells is cut through no cell of any map.
CELL = 32
#: The price at a threshold of a half. Gains by the rule of `region_cells` are about as large: p (1
#: - p) is 0.25 at most, and few detections lie in one cell.
HALF_PRICE = 0.1
#: Rows, and columns, of a grid from and to which rectangles are sought. Twice as many take 16 times
#: as long; 20 cells of 32 pixels are an image of 640.
_MOST_LINES = 24

Rectangle = tuple[int, int, int, int]


class _Spans(NamedTuple):
    """All spans of one side of a grid: where they start and end, and how long they are with
    halo."""

    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray


def grid_of(height: int, width: int, cell: int = CELL) -> tuple[int, int]:
    """Rows and columns of cells that cover an image, the last ones in part."""
    return -(-height // cell), -(-width // cell)


def choose_rectangles(
    gains: np.ndarray,
    price: float,
    halo: int = 1,
    limit: int = 2,
    overhead: float = 0.0,
    step: int = 1,
) -> list[Rectangle]:
    """The rectangles with the largest sum of gains less the price of their area.

    None overlap. Exact for up to two: of two, one lies left of or above the other, so the best pair
    is the best split into two halves. Where more than 24 rows or columns gain something, they are
    sought along every second, third, ... of them. More than two are sought in a `RegionTree`.

    Args:
        gains (np.ndarray): Of each cell, (h, w), finite; may be negative.
        price (float): In [0, infinity]. At 0 it is the whole image, whatever the gains.
        halo (int): Cells around a rectangle that are paid for, too, up to the image's edge.
            Defaults to 1.
        limit (int): The most rectangles. Defaults to 2.
        overhead (float): What each rectangle costs besides its area, in cells. Defaults to 0.
        step (int): Sides with halo are multiples of it, in cells. Defaults to 1.

    Returns:
        list[Rectangle]: Without halo, top ones first; none where nothing is worth its price.
    """
    gains = np.asarray(gains, np.float64)
    height, width = gains.shape
    if price <= 0:
        return [(0, 0, height, width)]
    if not np.isfinite(price) or gains.max(initial=0) <= 0:
        return []
    if limit > 2:
        return RegionTree(gains, halo, step).rectangles(price, limit, overhead)
    rows, columns = _sides(gains, halo, step)
    values = _sums(gains, rows, columns)
    values -= np.multiply.outer(columns.lengths * float(price), rows.lengths)
    values -= price * overhead
    indices = _best_pair(values, rows, columns) if limit > 1 else []
    indices = indices or _best_one(values)
    return sorted(_trimmed(gains, _rectangle(index, rows, columns)) for index in indices)


def highest_price(
    gains: np.ndarray, halo: int = 1, overhead: float = 0.0, step: int = 1, limit: int = 2
) -> float:
    """The price below which `choose_rectangles` chooses something: the largest gain per cell of any
    rectangle with its halo, 0 where nothing is to be gained. Arguments as there."""
    gains = np.asarray(gains, np.float64)
    if gains.max(initial=0) <= 0:
        return 0.0
    if limit > 2:
        return RegionTree(gains, halo, step).highest_price(overhead)
    rows, columns = _sides(gains, halo, step)
    areas = np.multiply.outer(columns.lengths, rows.lengths) + overhead
    return float((_sums(gains, rows, columns) / areas).max())


def threshold_of_price(price: float) -> float:
    """A price in [0, infinity] as a number in [0, 1] that rises with it; `HALF_PRICE` is a half. Of
    an image's highest price it is the difficulty: what exceeds the threshold is looked at."""
    return 1.0 if np.isinf(price) else price / (price + HALF_PRICE)


def price_of_threshold(threshold: float) -> float:
    """The opposite of `threshold_of_price`: infinity at 1, and 0 at and below 0."""
    return np.inf if threshold >= 1 else max(0.0, HALF_PRICE * threshold / (1 - threshold))


def with_halo(
    rectangle: Rectangle, grid: tuple[int, int], halo: int = 1, step: int = 1
) -> Rectangle:
    """A rectangle with its halo, up to the edge of a grid of (h, w) cells; see ``step`` of
    `choose_rectangles`."""
    top, left, bottom, right = rectangle
    (top, bottom), (left, right) = (
        _grown(start - halo, end + halo, count, step)
        for start, end, count in ((top, bottom, grid[0]), (left, right, grid[1]))
    )
    return top, left, bottom, right


def tiles_of(rectangle: Rectangle, most: int) -> list[Rectangle]:
    """A rectangle cut into tiles of about equal sides, each of ``most`` cells or less."""
    top, left, bottom, right = rectangle
    rows, columns = _parts(top, bottom, most), _parts(left, right, most)
    return [(up, start, down, end) for up, down in rows for start, end in columns]


def _parts(start: int, end: int, most: int) -> list[tuple[int, int]]:
    count = -(-(end - start) // most)
    lines = [start + (end - start) * part // count for part in range(count + 1)]
    return list(zip(lines, lines[1:]))


def _grown(start: int, end: int, count: int, step: int) -> tuple[int, int]:
    """A span, cut to ``count`` lines and lengthened as `lengths_with_halo` says, at both ends alike
    where there is room."""
    start, end = max(0, start), min(count, end)
    length = int(lengths_with_halo(start, end, count, 0, step))
    start = min(max(0, start - (length - (end - start)) // 2), count - length)
    return start, start + length


def share_of_area(
    rectangles: Sequence[Rectangle], grid: tuple[int, int], halo: int = 1, step: int = 1
) -> float:
    """Share of an image that is looked at again, halos included, where two overlap twice."""
    areas = 0
    for rectangle in rectangles:
        top, left, bottom, right = with_halo(rectangle, grid, halo, step)
        areas += (bottom - top) * (right - left)
    return areas / (grid[0] * grid[1])


def _sides(gains: np.ndarray, halo: int, step: int) -> tuple[_Spans, _Spans]:
    """Spans of rows and of columns that begin and end where there is something to be gained: what
    lies beyond costs and gains nothing."""
    good = gains > 0
    return (
        _spans(np.flatnonzero(good.any(1)), gains.shape[0], halo, step),
        _spans(np.flatnonzero(good.any(0)), gains.shape[1], halo, step),
    )


def _spans(lines: np.ndarray, count: int, halo: int, step: int) -> _Spans:
    """All spans from one of some lines to the end of another, of ``count`` lines in all."""
    every = -(-len(lines) // _MOST_LINES)
    starts, ends = lines[::every], np.unique([*lines[every - 1 :: every], lines[-1]]) + 1
    first, last = np.nonzero(starts[:, None] < ends)
    starts, ends = starts[first], ends[last]
    return _Spans(starts, ends, lengths_with_halo(starts, ends, count, halo, step))


def _sums(gains: np.ndarray, rows: _Spans, columns: _Spans) -> np.ndarray:
    """Sum of the gains inside each rectangle, (spans of columns, spans of rows)."""
    table = np.zeros((gains.shape[0] + 1, gains.shape[1] + 1))
    gains.cumsum(0).cumsum(1, out=table[1:, 1:])
    strips = np.ascontiguousarray((table[rows.ends] - table[rows.starts]).T)
    sums = strips[columns.ends]
    sums -= strips[columns.starts]
    return sums


def _best_one(values: np.ndarray) -> list[tuple[int, int]]:
    """The span of columns and that of rows of the best rectangle, if it is worth anything."""
    index = np.unravel_index(values.argmax(), values.shape)
    return [index] if values[index] > 0 else []


def _best_pair(values: np.ndarray, rows: _Spans, columns: _Spans) -> list[tuple[int, int]]:
    """The best two rectangles with a line between them, if they are worth more than the best
    one."""
    best, pair = max(0.0, values.max()), []
    for axis, spans in ((1, rows), (0, columns)):
        # The best rectangle of each span, whatever the other side's.
        span_best = np.maximum(values.max(1 - axis), 0)
        by_end, by_start = np.argsort(spans.ends), np.argsort(-spans.starts)
        upper, lower = (np.maximum.accumulate(span_best[order]) for order in (by_end, by_start))
        # How many spans begin at the end of another or beyond.
        behind = np.searchsorted(-spans.starts[by_start], -spans.ends[by_end], side='right')
        both = np.where(behind > 0, upper + lower[behind - 1], 0)
        place = both.argmax()
        if both[place] > best:
            first, second = by_end[: place + 1], by_start[: behind[place]]
            best = both[place]
            pair = [(axis, order[span_best[order].argmax()]) for order in (first, second)]
    return [_index_of(values, axis, span) for axis, span in pair]


def _index_of(values: np.ndarray, axis: int, span: int) -> tuple[int, int]:
    if axis:
        return int(values[:, span].argmax()), span
    return span, int(values[span].argmax())


def _rectangle(index: tuple[int, int], rows: _Spans, columns: _Spans) -> Rectangle:
    column, row = index
    return (
        int(rows.starts[row]),
        int(columns.starts[column]),
        int(rows.ends[row]),
        int(columns.ends[column]),
    )


def _trimmed(gains: np.ndarray, rectangle: Rectangle) -> Rectangle:
    """A rectangle without rows and columns at its edges where nothing is to be gained: there are
    some where not all lines were looked at."""
    top, left, bottom, right = rectangle
    inside = gains[top:bottom, left:right] > 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return (
        int(top + rows[0]),
        int(left + columns[0]),
        int(top + rows[-1] + 1),
        int(left + columns[-1] + 1),
    )


class PriceCurve(NamedTuple):
    """How much is looked at again at each price, on images of a validation set.

    Attributes:
        thresholds (np.ndarray): Prices as numbers in [0, 1], rising, (m,).
        shares (np.ndarray): Mean share of an image's pixels, falling, (m,).
        counts (np.ndarray): Mean number of rectangles, (m,).
    """

    thresholds: np.ndarray
    shares: np.ndarray
    counts: np.ndarray


def price_curve(
    maps: Sequence[np.ndarray],
    halo: int = 1,
    limit: int = 2,
    overhead: float = 0.0,
    points: int = 33,
    step: int = 1,
) -> PriceCurve:
    """Measure how much is chosen at each price.

    Args:
        maps (Sequence[np.ndarray]): The gains of n > 0 images, (h, w) each.
        halo, limit, overhead, step: As of `choose_rectangles`.
        points (int): Prices between nothing and everything, quantiles of the images' highest
            prices and lower ones. Defaults to 33.

    Raises:
        UsageError: If there are no images.
    """
    if not len(maps):
        raise UsageError('no images to choose regions of: the validation set is empty')
    highest = np.array([highest_price(gain_map, halo, overhead, step, limit) for gain_map in maps])
    some = np.quantile(highest[highest > 0], np.linspace(0, 1, points)) if highest.any() else []
    # Below the least of them images still differ in how much of them is chosen.
    lower = [some[0] * 2.0**-power for power in range(1, 9)] if len(some) else []
    thresholds = [0.0, *sorted({threshold_of_price(price) for price in (*lower, *some)}), 1.0]
    rows = []
    for threshold in thresholds:
        price = price_of_threshold(threshold)
        chosen = [
            choose_rectangles(gain_map, price, halo, limit, overhead, step) for gain_map in maps
        ]
        shares = [
            share_of_area(rectangles, gain_map.shape, halo, step)
            for rectangles, gain_map in zip(chosen, maps)
        ]
        rows.append((np.mean(shares), np.mean([len(rectangles) for rectangles in chosen])))
    shares, counts = np.array(rows).T
    return PriceCurve(np.array(thresholds), shares, counts)


def threshold_for_area(curve: PriceCurve, share: float) -> float:
    """The price, as a number in [0, 1], at which a share of the pixels is looked at again.

    Between two measured prices it is interpolated.

    Args:
        curve (PriceCurve): Of a validation set.
        share (float): In [0, 1]; 1 is the full second exit, 0 the first alone.

    Raises:
        UsageError: If the share is out of range.
    """
    if not 0 <= share <= 1:
        raise UsageError(f'a share of pixels must be in [0, 1], got {share}')
    if not share:
        # Of other images the highest price measured may choose something.
        return 1.0
    return threshold_for_cost(curve, curve.shares, share)


def threshold_for_cost(curve: PriceCurve, costs: Sequence[float], target: float) -> float:
    """The price, as a number in [0, 1], at which the mean cost is a target, or the dearest or
    cheapest one if the target is beyond them.

    Args:
        curve (PriceCurve): Of a validation set.
        costs (Sequence[float]): At each of its prices, (m,), in any unit.
        target (float): In that unit.
    """
    # From dear to cheap; noise in measured costs must not make them rise.
    falling = np.minimum.accumulate(np.asarray(costs, float))[::-1]
    return float(np.interp(target, falling, curve.thresholds[::-1]))
