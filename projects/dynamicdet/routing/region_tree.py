"""Many rectangles of an image: its cells are cut in two by a line, and each part again.

Of all parts those are chosen that do not overlap and are worth the most. It takes a time that
depends on how many cells gain something, hardly on the size of the grid.

Letters: ``n``: cells of a part that gain something. See `regions` for rectangles and prices.
"""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

#: Cuts of an image: bounds how long choosing takes, on any grid.
_MOST_CUTS = 64


@dataclass
class _Part:
    """Cells that gain something, and the rectangle around them.

    Attributes:
        box (tuple): Top, left, bottom, right.
        gain (float): Of all cells inside.
        area (int): With halo.
        parts (tuple): The two that it is cut into, or none.
    """

    box: tuple[int, int, int, int]
    gain: float
    area: int
    parts: tuple['_Part', ...] = ()


class RegionTree:
    """The cuts of an image's grid.

    Args:
        gains (np.ndarray): Of each cell, (h, w); some are positive.
        halo, step (int): As of `regions.choose_rectangles`.
    """

    def __init__(self, gains: np.ndarray, halo: int, step: int = 1) -> None:
        self._gains, self._grown = gains, (halo, step)
        cells = np.argwhere(gains > 0)
        self._parts = [self._part(cells)]
        number, waiting = itertools.count(), []
        self._wait(waiting, number, self._parts[0], cells)
        for _ in range(_MOST_CUTS):
            if not waiting:
                break
            # The cut that saves the most area comes first.
            _, _, part, both = heapq.heappop(waiting)
            part.parts = tuple(self._part(cells) for cells in both)
            self._parts += part.parts
            for half, cells in zip(part.parts, both):
                self._wait(waiting, number, half, cells)

    def rectangles(self, price: float, limit: int, overhead: float) -> list[tuple]:
        """The best rectangles at a price above 0, at most ``limit``; arguments as of
        `regions.choose_rectangles`."""
        # Of each part what is best with 0, 1, 2, ... rectangles: what they are worth, and their
        # boxes. Parts come before those that they are cut into.
        best: dict[int, list[tuple[float, tuple]]] = {}
        for part in reversed(self._parts):
            options = [(0.0, ())]
            if part.parts:
                options = _joined(*(best.pop(id(half)) for half in part.parts), limit)
            value = part.gain - price * (part.area + overhead)
            if value > 0 and value > max(options[:2])[0]:
                options[1:2] = [(value, (part.box,))]
            best[id(part)] = options
        return sorted(max(best[id(self._parts[0])])[1])

    def highest_price(self, overhead: float) -> float:
        """The price below which there are rectangles."""
        return max(part.gain / (part.area + overhead) for part in self._parts)

    def _part(self, cells: np.ndarray) -> _Part:
        (top, left), (bottom, right) = cells.min(0).tolist(), (cells.max(0) + 1).tolist()
        height, width = (
            int(lengths_with_halo(low, high, side, *self._grown))
            for low, high, side in zip((top, left), (bottom, right), self._gains.shape)
        )
        gain = float(self._gains[top:bottom, left:right].sum())
        return _Part((top, left, bottom, right), gain, height * width)

    def _wait(self, waiting: list, number, part: _Part, cells: np.ndarray) -> None:
        if len(cells) < 2:
            return
        areas, both = min((self._cut(cells, axis) for axis in (0, 1)), key=lambda cut: cut[0])
        if both:
            heapq.heappush(waiting, (areas - part.area, next(number), part, both))

    def _cut(self, cells: np.ndarray, axis: int) -> tuple[float, tuple]:
        """Cells, (n, 2), cut along rows or columns where the two rectangles have the least area:
        that area, and the two, none if they are all in one line."""
        cells = cells[np.argsort(cells[:, axis], kind='stable')]
        along, across = cells[:, axis], cells[:, 1 - axis]
        where = np.flatnonzero(along[1:] > along[:-1])
        if not len(where):
            return np.inf, ()
        side, other, grown = self._gains.shape[axis], self._gains.shape[1 - axis], self._grown
        low, high = np.minimum.accumulate(across)[where], np.maximum.accumulate(across)[where]
        areas = lengths_with_halo(along[0], along[where] + 1, side, *grown) * lengths_with_halo(
            low, high + 1, other, *grown
        )
        low = np.minimum.accumulate(across[::-1])[::-1][where + 1]
        high = np.maximum.accumulate(across[::-1])[::-1][where + 1]
        areas += lengths_with_halo(along[where + 1], along[-1] + 1, side, *grown) * (
            lengths_with_halo(low, high + 1, other, *grown)
        )
        place = areas.argmin()
        middle = where[place] + 1
        return float(areas[place]), (cells[:middle], cells[middle:])


def _joined(some: list[tuple], others: list[tuple], limit: int) -> list[tuple]:
    """The best of two parts with each number of rectangles, at most ``limit``."""
    options = [(0.0, ())] * min(limit + 1, len(some) + len(others) - 1)
    for count, (value, boxes) in enumerate(some):
        for more, (other, added) in enumerate(others[: len(options) - count], count):
            if value + other > options[more][0]:
                options[more] = value + other, boxes + added
    return options


def lengths_with_halo(start, end, count: int, halo: int, step: int):
    """Of spans of ``count`` lines, with what is looked at around them: multiples of a step, or all
    lines."""
    lengths = np.minimum(end + halo, count) - np.maximum(start - halo, 0)
    return np.minimum(-(-lengths // step) * step, count)
