"""Latency of each exit of a dynamic detector."""

from collections.abc import Sequence

import torch
from mmengine.dataset import pseudo_collate

from ..models import DynamicDetector
from ..models.budget_control import preserved_budget
from ..progress import Progress
from ..routing.thresholds import ALL_EASY, ALL_HARD
from ..timing import time_in_turns

#: Images whose GFLOPs are counted, and whose latency is measured, of all sizes; and of one size at
#: the least.
_COUNTED, _TIMED, _LEAST = 10, 20, 2


def force_dynamic_exit(model: DynamicDetector, exit: int) -> None:
    """Send every image to one exit: past all exits before it, and no further."""
    thresholds = [ALL_HARD] * exit + [ALL_EASY] * (model.num_exits - 1 - exit)
    model.set_budget(threshold=thresholds[0] if len(thresholds) == 1 else thresholds)


@torch.no_grad()
def measure_latencies(
    model: DynamicDetector,
    dataset,
    progress: Progress,
    images: int = 20,
    rounds: int = 5,
    rows: Sequence[int] | None = None,
) -> tuple[float, ...]:
    """Median seconds per image of each exit: batch 1, data in memory, exits taking turns.

    Args:
        model (DynamicDetector): In eval mode, on the device that counts.
        dataset: The data set; its first ``images`` are timed.
        progress (Callable): Wraps what is iterated over.
        images (int): How many images. Defaults to 20.
        rounds (int): How often each is timed, after one untimed round. Defaults to 5.
        rows (Sequence[int], optional): Which images instead of the first.
    """
    batches = single_batches(dataset, images, rows)
    with preserved_budget(model):
        medians = time_in_turns(
            {exit: model.test_step for exit in range(model.num_exits)},
            batches,
            model.threshold.device,
            progress,
            rounds,
            lambda exit: force_dynamic_exit(model, exit),
        )
    return tuple(medians.values())


def rows_by_size(model: DynamicDetector, shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Images that cost the same, but for a two-stage head's proposals: of one size, padded as the
    network sees it.

    Args:
        model (DynamicDetector): That sees them.
        shapes (Sequence[tuple]): Height and width of each image, as delivered, (n,).

    Returns:
        list[list[int]]: Rows of each size.
    """
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    rows: dict[tuple, list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(tuple(-(-side // divisor) for side in shape), []).append(row)
    return list(rows.values())


def rows_to_measure(rows: Sequence[int], sizes: int) -> tuple[Sequence[int], Sequence[int]]:
    """Of the rows of one of so many sizes, those whose GFLOPs are counted and those that are
    timed."""
    counted, timed = (rows[: max(number // sizes, _LEAST)] for number in (_COUNTED, _TIMED))
    return counted, timed


def single_batches(dataset, images: int, rows: Sequence[int] | None) -> list[dict]:
    """Batches of one image: the first ones, or those of some rows."""
    return [
        pseudo_collate([dataset[row]])
        for row in (range(min(images, len(dataset))) if rows is None else rows)
    ]
