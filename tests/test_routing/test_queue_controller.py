"""Thresholds that follow a queue, on simulated ones: seconds are counted, not waited for."""

import heapq

import numpy as np
import pytest

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.routing.queue_controller import QueueController, Waiting

FIRST, LATER, TARGET = 0.010, 0.020, 0.200


def serve(load, seconds=60.0, target=TARGET, speed=lambda time: 1.0, batch=8):
    """A server of one worker: times from arrival to answer, exits, refusals, difficulties of the
    answered. ``load`` is in images per second; passes take ``1 / speed`` of their time."""
    generator = np.random.default_rng(SEED)
    arrivals = np.cumsum(generator.exponential(1 / load, int(load * seconds)))
    queue, later, done, refused = [], [], [], 0
    now, coming = 0.0, list(arrivals[::-1])
    state = Waiting(0, 0, 0.0)
    controller = QueueController(target, lambda: state, (FIRST, FIRST + LATER))

    def take_arrivals(busy=0):
        # What came during a pass found it running.
        nonlocal refused
        while coming and coming[-1] <= now:
            arrival = coming.pop()
            if controller.refuses(Waiting(len(queue) + busy, len(later), 0.0)):
                refused += 1
            else:
                queue.append((arrival, generator.uniform()))

    busy = 0
    while coming or queue or later:
        take_arrivals(busy)
        busy = 0
        due = bool(later) and now - later[0][0] >= target / 2
        most = min(batch, controller.most('later'))
        if queue and not due and len(later) < most:
            taken = queue[: min(batch, controller.most('first'))]
            del queue[: len(taken)]
            cost, busy = FIRST * len(taken) / speed(now), len(taken)
            now += cost
            state = Waiting(len(queue), len(later), now - taken[0][0])
            threshold = controller.decide([difficulty for _, difficulty in taken])
            controller.passed('first', cost, len(taken))
            for arrival, difficulty in taken:
                if difficulty > threshold:
                    heapq.heappush(later, (arrival, difficulty))
                else:
                    done.append((now - arrival, 0, difficulty))
        elif later:
            taken = [heapq.heappop(later) for _ in range(min(most, len(later)))]
            cost = LATER * len(taken) / speed(now)
            now += cost
            controller.passed('later', cost, len(taken))
            done += [(now - arrival, 1, difficulty) for arrival, difficulty in taken]
        else:
            now = coming[-1]
    return (*map(np.array, zip(*done)), refused)


#: Images per second that all go through both passes, and that all leave at the first exit.
ALL_HARD, ALL_EASY = 1 / (FIRST + LATER), 1 / FIRST


@pytest.mark.parametrize('load', [0.2 * ALL_HARD, ALL_HARD, 1.5 * ALL_HARD, 0.85 * ALL_EASY])
def test_answers_are_in_time_until_the_easy_path_is_full(load):
    times, exits, difficulties, refused = serve(load)
    assert np.quantile(times, 0.95) < TARGET and refused <= 0.04 * len(times)
    # What is left of the time is used: the share that work allows, less what luck takes.
    fits = min(1, (1 / load - FIRST) / LATER)
    assert 0.5 * fits - 0.05 < exits.mean() <= fits + 0.05


def test_the_easiest_are_left_out():
    _, exits, difficulties, _ = serve(1.5 * ALL_HARD)
    assert difficulties[exits == 1].mean() > difficulties[exits == 0].mean() + 0.25


def test_beyond_the_easy_path_it_refuses_and_what_it_accepts_is_in_time():
    times, exits, _, refused = serve(1.5 * ALL_EASY)
    assert refused > 0.2 * len(times) and np.quantile(times, 0.95) < TARGET
    # Load was shed before.
    assert exits.mean() < 0.05


def test_a_slower_machine_is_noticed():
    half = serve(0.8 * ALL_HARD, speed=lambda time: 0.5)
    times, exits, _, refused = half
    assert np.quantile(times, 0.95) < TARGET and exits.mean() < 0.6 and refused < 0.04 * len(times)


@pytest.mark.parametrize('target', [0.0, -1, float('nan'), float('inf'), FIRST])
def test_targets_that_are_none_are_refused(target):
    with pytest.raises(UsageError, match='target'):
        QueueController(target, None, (FIRST, FIRST + LATER))


def test_several_exits_and_odd_difficulties():
    controller = QueueController(
        TARGET, lambda: Waiting(0, 0, FIRST), (FIRST, FIRST + LATER), exits=3
    )
    assert len(controller.decide([0.1, float('nan'), 2.0, 0.9])) == 2
    assert list(controller._recent) == [0.1, 0.9]
    assert len(controller.decide([])) == 2
