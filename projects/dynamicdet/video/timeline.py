"""Exit and cost of a video over time, in a memory that does not grow; and a picture of it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..files import write_atomically
from ..reports.figures import png

#: More than a picture has pixels for.
MOST_BINS = 1000


@dataclass
class Bin:
    """Frames that follow each other: sums over them. ``time`` is the first one's, in seconds."""

    time: float
    frames: int = 0
    faults: int = 0
    seconds: float = 0.0
    gflops: float = 0.0
    exits: Counter = field(default_factory=Counter)

    def add(self, other: 'Bin') -> None:
        """Take the frames of another bin in."""
        self.frames += other.frames
        self.faults += other.faults
        self.seconds += other.seconds
        self.gflops += other.gflops
        self.exits += other.exits


class Timeline:
    """What each frame took, in at most ``most`` bins: when they are full, each two become one.

    Args:
        most (int): At least 2. Defaults to 1000.
    """

    def __init__(self, most: int = MOST_BINS) -> None:
        self.bins: list[Bin] = []
        self.per_bin, self._most, self._count = 1, most, 0

    def add(self, time: float, exit: int | None, seconds: float, gflops: float | None) -> None:
        """Take a frame.

        Args:
            time (float): In the video, seconds.
            exit (int, optional): None for a detector without exits.
            seconds (float): That the detector took.
            gflops (float, optional): Its cost; None if it is not known.
        """
        self._append(
            Bin(time, 1, 0, seconds, gflops or 0.0, Counter([] if exit is None else [exit]))
        )

    def add_fault(self, time: float) -> None:
        """Take a frame that cannot be read."""
        self._append(Bin(time, faults=1))

    def _append(self, piece: Bin) -> None:
        if self._count % self.per_bin:
            self.bins[-1].add(piece)
        else:
            if len(self.bins) == self._most:
                self._halve()
            # After halving an odd number the last bin is half full.
            if self._count % self.per_bin:
                self.bins[-1].add(piece)
            else:
                self.bins.append(piece)
        self._count += 1

    def _halve(self) -> None:
        for first, second in zip(self.bins[::2], self.bins[1::2]):
            first.add(second)
        self.bins, self.per_bin = self.bins[::2], 2 * self.per_bin

    @property
    def total(self) -> Bin:
        """The sum of all."""
        total = Bin(0.0)
        for piece in self.bins:
            total.add(piece)
        return total


def draw_timeline(timeline: Timeline, path: str | Path, exits: int) -> None:
    """Write a picture (PNG): the share of each exit, and the mean costs, over time.

    Args:
        timeline (Timeline): Of a video.
        path (str or Path): File to write.
        exits (int): Number of exits, E; 0 for a detector without.
    """
    bins = [piece for piece in timeline.bins if piece.frames]
    times, frames = (
        np.array([piece.time for piece in bins]),
        np.array([piece.frames for piece in bins]),
    )
    known = dict(exits=exits, gflops=any(piece.gflops for piece in bins), ms=True)
    rows = [kind for kind, there in known.items() if there]
    figure = Figure(figsize=(10, 1 + 1.8 * len(rows)), layout='constrained')
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axis, kind in zip(axes, rows):
        if kind == 'exits':
            _draw_exits(axis, times, bins, frames, exits)
        elif len(bins):
            values = [
                piece.gflops if kind == 'gflops' else 1e3 * piece.seconds for piece in bins
            ] / frames
            mean = np.average(values, weights=frames)
            axis.step(times, values, where='post', linewidth=0.8)
            axis.axhline(
                mean, linestyle='--', linewidth=0.8, color='black', label=f'mean {mean:.3g}'
            )
            axis.set_ylim(bottom=0)
            axis.legend(loc='upper right')
        axis.set_ylabel(
            dict(exits='share of exits', gflops='GFLOPs per frame', ms='ms per frame')[kind]
        )
        for piece in timeline.bins:
            if piece.faults:
                axis.axvline(piece.time, color='red', linewidth=1, alpha=0.8)
    axes[-1].set_xlabel(
        'seconds in the video'
        + (' (red: frames that cannot be read)' if timeline.total.faults else '')
    )
    write_atomically(png(figure), path)


def _draw_exits(axis, times, bins, frames, exits) -> None:
    """Stacked shares; -1 is drawn first, if any frame left there."""
    there = ([-1] if any(piece.exits[-1] for piece in bins) else []) + list(range(exits))
    colors = colormaps['viridis'](np.linspace(0, 1, len(there)))
    if bins:
        shares = np.array([[piece.exits[exit] for piece in bins] for exit in there]) / frames
        # A step lasts until the next one; the last as long as the one before.
        ends = np.append(times, times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1))
        axis.stackplot(
            ends,
            np.hstack([shares, shares[:, -1:]]),
            colors=colors,
            step='post',
            labels=[f'exit {exit}' for exit in there],
        )
        axis.legend(loc='center left', bbox_to_anchor=(1.0, 0.5), fontsize='small')
    axis.set_ylim(0, 1)
