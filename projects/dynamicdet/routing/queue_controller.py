"""Answer in time: raise the threshold while pictures wait for their turn.

Letters: ``first`` is the seconds that the first pass takes of an image, easy ones up to their
boxes; ``later`` what the passes behind it take; ``share`` the hard share aimed at, in [0, 1].
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..errors import UsageError
from .thresholds import ALL_EASY, Thresholds, thresholds_for_share

#: The parts of the target that a forecast may fill before no image goes on, and before none is
#: taken. What is between them is shed before anything is refused; the rest is for what a forecast
#: does not see: decoding, the network, slower passes (tried on simulated queues).
_SHED, _REFUSED = 0.6, 0.9
#: Images after which a new share, and a new time of a pass, counts by two thirds: a threshold that
#: jumped with each batch would choose by the moment, not by difficulty.
_INERTIA = 8


class Waiting(NamedTuple):
    """What waits: images before the first pass, those before a later one, and the seconds since the
    oldest of those arrived that are in the first pass now."""

    first: int
    later: int
    age: float


class QueueController:
    """Thresholds by which images are answered within a time, the wait in the queues included.

    For each batch it forecasts when its oldest image would be answered if it went on: its age, what
    waits before the first pass, and what waits before later ones. While that takes less than half
    of the time that is left, all images may go on; then fewer and fewer of them, the easiest left
    out first; none where the time is up. It is proportional, not integral: queues integrate.

    It has the interface of `BudgetController` that `Stream` uses. Not for several threads at once,
    but for `refuses`.

    Args:
        target (float): Seconds from arrival to answer.
        queue (Callable): Gives what waits now.
        costs (Sequence[float]): Seconds that an image takes to the first and to the last exit; it
            goes on learning them from `passed`.
        difficulties (Sequence[float]): A calibration's, to start from.
        exits (int): K. Defaults to 2.
        most_share (float): The hard share of a server with nothing to do. Defaults to 1.
        window (int): How many difficulties the threshold is taken from. Defaults to 256.

    Raises:
        UsageError: If a number is out of range, or the first pass alone takes longer.
    """

    #: What images take is told by `passed`.
    measures = False

    def __init__(
        self,
        target: float,
        queue: Callable[[], Waiting],
        costs: Sequence[float],
        difficulties: Sequence[float] = (),
        exits: int = 2,
        most_share: float = 1.0,
        window: int = 256,
    ) -> None:
        self.first = costs[0]
        self.later = max(costs[-1] - costs[0], 0.0)
        # Not `target <= 0`, which lets NaN pass.
        if not 0 < target < float('inf') or not 0 <= most_share <= 1:
            raise UsageError(
                'a target latency is seconds above 0, and a hard share in [0, 1]; got '
                f'{target} and {most_share}'
            )
        if self.first > _SHED * target:
            raise UsageError(
                f'a target latency of {target:g} s is out of reach: an image takes '
                f'{self.first:.3g} s to the first exit alone; ask for {self.first * 2:.2g} or more'
            )
        self.target, self.queue, self.exits, self.most_share = target, queue, exits, most_share
        #: How many images passes may take at once.
        self._most: dict[str, int] = {}
        self.share, self.threshold = most_share, ALL_EASY
        self._recent: deque[float] = deque(list(difficulties)[-window:], maxlen=window)

    def decide(self, difficulties: Sequence[float]) -> Thresholds:
        """Take the difficulties of a batch, (n,), and say its threshold, or the K - 1 of more
        exits."""
        waiting = self.queue()
        usable = [value for value in difficulties if 0 <= value <= 1]
        self._recent.extend(usable)
        ahead = waiting.age + waiting.first * self.first + waiting.later * self.later
        going_on = max(1.0, self.share * len(difficulties)) * self.later
        reach = _SHED * self.target
        # Of the reach, what a server with nothing else to do would leave.
        slack = reach - self.first - self.later
        room = 2 * (reach - ahead - going_on) / slack if slack > 0 else 0.0
        wanted = min(max(room, 0.0), self.most_share)
        self.share += (wanted - self.share) * min(1.0, len(difficulties) / _INERTIA)
        if ahead + self.later >= _REFUSED * self.target or not self._recent:
            self.share = min(self.share, wanted)
            self.threshold = self._all_easy()
        else:
            self.threshold = thresholds_for_share(list(self._recent), self.share, self.exits)
        return self.threshold

    def passed(self, what: str, seconds: float, images: int) -> None:
        """Take how long a pass took: of a `Stream`'s ``on_pass``."""
        kept, limit = (1 - 1 / _INERTIA) ** images, self.target / 4
        # Images together take less than one by one: how much less is seen by trying.
        if seconds > limit:
            self._most[what] = max(1, int(images * limit / seconds))
        elif images >= self.most(what):
            self._most[what] = images + 1
        if what == 'first':
            self.first = kept * self.first + (1 - kept) * seconds / images
        else:
            self.later = kept * self.later + (1 - kept) * seconds / images

    def measure(self, seconds: float, images: int = 1) -> None:
        """Nothing: `passed` knows it pass by pass."""

    def refuses(self, waiting: Waiting) -> bool:
        """Whether an image that comes now could not be answered in time, not even an easy one."""
        ahead = (waiting.first + 1) * self.first + waiting.later * self.later
        return ahead > _REFUSED * self.target

    def most(self, what: str) -> int:
        """How many images a pass, 'first' or 'later', may take at once: a quarter of the target
        must do for it."""
        return self._most.get(what, 1)

    def status(self) -> Mapping[str, object]:
        """Plain numbers."""
        return dict(
            target=self.target,
            share=self.share,
            threshold=self.threshold,
            first=self.first,
            later=self.later,
        )

    def _all_easy(self) -> Thresholds:
        return ALL_EASY if self.exits == 2 else [ALL_EASY] * (self.exits - 1)
