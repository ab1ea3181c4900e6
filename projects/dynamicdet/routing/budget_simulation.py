"""A budget held by an online controller, simulated: streams that drift and machines that slow down.
No model, no clock.

Letters: n images arrive; ``difficulties``, (n,), in [0, 1]; ``latencies``, (n, K), the seconds that
each image would take at each exit.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from .budget_controller import BudgetController


def drifting_difficulties(n: int, period: float, swing: float = 1.5, seed: int = 0) -> np.ndarray:
    """Difficulties that follow day and night: ``sigmoid(z + swing * sin(2 pi i / period))``, z
    standard normal.

    Args:
        n (int): How many.
        period (float): Images from one night to the next.
        swing (float): How far the distribution moves. 0 is a stationary stream. Defaults to 1.5.
        seed (int): Of the noise.

    Returns:
        ndarray: (n,), float32.
    """
    noise = np.random.default_rng(seed).normal(size=n)
    return _sigmoid(noise + swing * np.sin(2 * np.pi * np.arange(n) / period))


def stepping_difficulties(
    n: int, at: int, before: float = -1.5, after: float = 1.5, seed: int = 0
) -> np.ndarray:
    """Difficulties that change from one image to the next, ``at`` that one: ``sigmoid(z + before or
    after)``."""
    noise = np.random.default_rng(seed).normal(size=n)
    return _sigmoid(noise + np.where(np.arange(n) < at, before, after))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-values))).astype(np.float32)


def drifting_order(
    difficulties: Sequence[float], n: int, period: float, seed: int = 0
) -> np.ndarray:
    """An order of recorded images in which difficulty drifts as day and night do.

    Image i is drawn from the half of the record whose ranks lie around ``0.5 + 0.25 * sin(2 pi i /
    period)``, so every image can come, and some come several times.

    Args:
        difficulties (Sequence[float]): The record's, (m,).
        n (int): How many images the stream has.
        period (float): Images from one night to the next.
        seed (int): Of the draws.

    Returns:
        ndarray: Numbers of images, (n,), in [0, m).
    """
    center = 0.5 + 0.25 * np.sin(2 * np.pi * np.arange(n) / period)
    rank = center + np.random.default_rng(seed).uniform(-0.25, 0.25, n)
    order = np.argsort(difficulties, kind='stable')
    return order[np.clip((rank * len(order)).astype(int), 0, len(order) - 1)]


def loaded_latencies(
    n: int,
    latencies: Sequence[float],
    spikes: Sequence[tuple[int, int]] = (),
    factor: float = 2.0,
    noise: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    """Seconds that each image would take at each exit.

    Args:
        n (int): How many images.
        latencies (Sequence[float]): Of each exit when the machine is idle, (K,), seconds.
        spikes (Sequence[tuple]): First image, and the one after the last, of each stretch under
            load.
        factor (float): What load multiplies all latencies by. Defaults to 2.
        noise (float): Standard deviation of the logarithm of each image's latency. Its mean stays.
            Defaults to 0.1.
        seed (int): Of the noise.

    Returns:
        ndarray: (n, K).
    """
    load = np.ones(n)
    for start, stop in spikes:
        load[start:stop] = factor
    shaken = np.exp(np.random.default_rng(seed + 1).normal(-(noise**2) / 2, noise, n))
    return (load * shaken)[:, None] * np.asarray(latencies)


def simulate_controller(
    controller: BudgetController,
    difficulties: Sequence[float],
    latencies: np.ndarray,
    batch: int = 8,
    delay: int = 0,
) -> dict[str, np.ndarray]:
    """Let a controller route a stream.

    Args:
        controller (BudgetController): It is changed.
        difficulties (Sequence[float]): (n,).
        latencies (ndarray): (n, K), seconds.
        batch (int): Images of a batch. Defaults to 8.
        delay (int): After how many further batches the time of one is known. Defaults to 0.

    Returns:
        dict: Per batch, (ceil(n / batch),): ``threshold`` (the first one), ``share`` aimed at,
            ``hard`` (share of images not at the first exit), ``difficulty`` and ``latency``, means
            over its images; and ``images``.
    """
    rows, waiting = [], deque()
    for start in range(0, len(difficulties), batch):
        scores = np.asarray(difficulties[start : start + batch], np.float32)
        threshold = np.atleast_1d(np.float32(controller.decide(scores)))
        taken = (scores[:, None] > threshold).sum(1)
        seconds = latencies[start : start + batch][np.arange(len(scores)), taken]
        rows.append(
            (
                threshold[0],
                controller.share,
                (taken > 0).mean(),
                scores.mean(),
                seconds.mean(),
                len(scores),
            )
        )
        waiting.append((float(seconds.sum()), len(scores)))
        if len(waiting) > delay:
            controller.measure(*waiting.popleft())
    names = ('threshold', 'share', 'hard', 'difficulty', 'latency', 'images')
    return dict(zip(names, np.array(rows).T))


def running_mean(values: Sequence[float], count: int) -> np.ndarray:
    """Mean of each value and up to ``count - 1`` before it, (n,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - count, 0)
    return (total[ends] - total[starts]) / (ends - starts)
