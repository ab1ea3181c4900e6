"""The same on a Ray cluster: two pools of processes, for the first pass and for the later ones.

A part goes through the pools as one row of a Ray data set, so a process that dies takes with it no
more than parts that Ray gives to another. This process writes what comes back: each part once.
Pickles are of this run's own processes alone: nothing that comes from elsewhere is unpickled.
"""

import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import import_optional
from .passes import Passes, measure_passes
from .table import ResultTable


@dataclass(frozen=True)
class PoolPlan:
    """How work is shared out.

    Attributes:
        first, later (int): Processes of each pool at the beginning; ``later`` is 0 where one pool
            does both.
        most (int): Up to which each pool may grow, in all.
        hand_over (bool): Whether maps go with hard pictures, or these are begun once more.
        why (str): In a line.
    """

    first: int
    later: int
    most: int
    hand_over: bool
    why: str


def share_out(workers: int, share: float, first: float, later: float) -> tuple[int, int]:
    """Processes of two pools, so that both are busy: ``later / first`` is as near as it gets to
    ``share * later seconds / first seconds``, and each pool has one.

    Args:
        workers (int): In all, 2 or more.
        share (float): Of hard pictures, in [0, 1].
        first, later (float): Seconds of a picture in each.
    """
    ratio = share * later / first
    at_first = round(workers / (1 + ratio))
    at_first = min(max(at_first, 1), workers - 1)
    return at_first, workers - at_first


def start(address: str | None = None, workers: int | None = None):
    """Ray, connected.

    Args:
        address (str, optional): Of a cluster. Defaults to a new one on this machine, which ends
            with this process.
        workers (int, optional): Processes of a new one. Defaults to a process per core.

    Raises:
        UsageError: If it is not installed.
    """
    ray = import_optional('ray', 'clusters', 'ray')
    import_optional('ray.data', 'clusters', 'ray')
    import logging

    if not ray.is_initialized():
        settings = dict(num_cpus=workers) if address is None else {}
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
            **settings,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    return ray


def make_plan(
    ray: Any,
    passes: Passes,
    table: ResultTable,
    workers: int,
    share: float,
    pools: int = 2,
    handover: str = 'auto',
) -> PoolPlan:
    """Decide by measuring on a picture: how many processes each pool has, and whether maps are
    handed over.

    Args:
        ray: See `start`.
        passes (Passes): The detector, in this process.
        table (ResultTable): What is to be done.
        workers (int): Processes in all.
        share (float): Of hard pictures that is expected, in [0, 1].
        pools (int): 1 or 2. Defaults to 2, where there are two workers.
        handover (str): 'maps', 'picture', or what is cheaper: 'auto'.
    """
    if pools == 1 or workers < 2:
        return PoolPlan(workers, 0, workers, True, f'{workers} processes do all passes')
    waiting = (picture for number in table.missing() for picture in table.part(number))
    measured = next(filter(None, (measure_passes(passes, picture) for picture in waiting)), None)
    if measured is None:
        return PoolPlan(workers, 0, workers, True, 'no picture can be read')
    first, later, size = measured
    carried = measure_handover(ray, size)
    hand_over = handover == 'maps'
    if handover == 'auto':
        # In batches of several, results hang on the batch by rounding: maps keep them equal.
        hand_over = carried < first or passes.batch_size > 1
    cost = later + (carried if hand_over else first)
    at_first, at_later = share_out(workers, share, first, cost)
    how = 'maps are handed over' if hand_over else 'later passes start from the picture'
    return PoolPlan(
        at_first,
        at_later,
        workers,
        hand_over,
        f'{at_first} processes for the first pass ({first * 1e3:.1f} ms), {at_later} for later '
        f'ones ({later * 1e3:.1f} ms, {share:.0%} hard); {how} ({size / 1e6:.2f} MB in '
        f'{carried * 1e3:.1f} ms)',
    )


def measure_handover(ray: Any, size: int, rounds: int = 3) -> float:
    """Seconds, at least of some rounds, in which so many bytes go through the object store, packed
    and unpacked as `detect_in_pools` does."""
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        pickle.loads(ray.get(ray.put(pickle.dumps(values, protocol=5))))
        times.append(time.perf_counter() - begin)
    return min(times)


class _Worker:
    """A process of a pool: a detector of its own."""

    def __init__(self, build: Callable[[], Passes], hand_over: bool, both: bool) -> None:
        import torch

        # A process per core: threads of one would take others' cores.
        torch.set_num_threads(1)
        self.passes, self.hand_over, self.both = build(), hand_over, both


class _First(_Worker):
    """The first pass of parts; all passes where there is one pool."""

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        done = []
        for content in batch['content']:
            pictures = pickle.loads(content)
            if self.both:
                done.append(pickle.dumps((self.passes.rows_of(pictures), [])))
            else:
                rows, hard = self.passes.first(pictures, hand_over=self.hand_over)
                # The rows are there once the others are.
                hard = list(hard)
                done.append(pickle.dumps((rows, hard), protocol=5))
        return dict(number=batch['number'], content=done)


class _Later(_Worker):
    """The later passes of parts."""

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        done = []
        for content in batch['content']:
            rows, hard = pickle.loads(content)
            for group in hard:
                for place, row in zip(group.places, self.passes.later(group)):
                    rows[place] = row
            done.append(pickle.dumps((rows, []), protocol=5))
        return dict(number=batch['number'], content=done)


def detect_in_pools(
    ray: Any,
    build: Callable[[], Passes],
    table: ResultTable,
    plan: PoolPlan,
    tell: Callable[[int], object],
    gpus: float = 0.0,
) -> None:
    """Make all parts of a table that are missing, on a cluster.

    Args:
        ray: See `start`.
        build (Callable): Makes the detector, in each process: picklable.
        table (ResultTable): Entered.
        plan (PoolPlan): See `make_plan`.
        tell (Callable): Told of each part how many pictures it has.
        gpus (float): Of each process. Defaults to 0.
    """
    from ray.data import ActorPoolStrategy

    missing = table.missing()
    if not missing:
        return
    parts = [dict(number=number, content=pickle.dumps(table.part(number))) for number in missing]
    data = ray.data.from_items(parts, override_num_blocks=len(parts))

    def pool(size: int, other: int) -> ActorPoolStrategy:
        # It grows where the other has nothing to do, and leaves it one.
        return ActorPoolStrategy(
            min_size=1, max_size=max(1, plan.most - bool(other)), initial_size=size
        )

    settings = dict(batch_size=1, num_cpus=1, num_gpus=gpus, zero_copy_batch=True)
    two = plan.later > 0
    data = data.map_batches(
        _First,
        fn_constructor_args=(build, plan.hand_over, not two),
        compute=pool(plan.first, plan.later),
        **settings,
    )
    if two:
        data = data.map_batches(
            _Later,
            fn_constructor_args=(build, plan.hand_over, False),
            compute=pool(plan.later, plan.first),
            **settings,
        )
    for batch in data.iter_batches(batch_size=1, prefetch_batches=0):
        for number, content in zip(batch['number'], batch['content']):
            rows, _ = pickle.loads(content)
            table.write(int(number), rows)
            tell(len(rows))
