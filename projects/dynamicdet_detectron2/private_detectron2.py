"""All that is used of Detectron2's private API: it may move with any release."""

from collections.abc import Iterator
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase


def batch_iterator(trainer: TrainerBase) -> Iterator[Any]:
    """The batches that a trainer takes, a `DefaultTrainer`'s or a simple one's. 0.6 makes the
    iterator with the trainer, main with the first access."""
    return getattr(trainer, '_trainer', trainer)._data_loader_iter


def hooks_of(trainer: TrainerBase) -> list[HookBase]:
    """What is registered with a trainer."""
    return trainer._hooks
