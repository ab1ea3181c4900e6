"""AP of every exit of an early-exit detector, in the usual validation and test.

In a config: ``val_cfg = dict(type='AllExitsValLoop')`` with ``val_evaluator =
dict(type='ExitsMetric', ann_file=...)``; ``AllExitsTestLoop`` for tests.
"""

import contextlib
import io
from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.runner import TestLoop, ValLoop
from mmengine.runner.amp import autocast

from mmdet.evaluation import CocoMetric
from mmdet.registry import LOOPS, METRICS
from mmdet.structures import SampleList

from ..engine.unwrapping import unwrap
from ..errors import UsageError


def all_exits_step(model: torch.nn.Module, batch: dict) -> SampleList:
    """Run a batch through all exits.

    Args:
        model (nn.Module): An `EarlyExitDetector`, wrapped or not.
        batch (dict): As a data loader gives it.

    Returns:
        list[DetDataSample]: Of each frame, with ``exits``: a list of E InstanceData, and the last
            one as ``pred_instances``.
    """
    from .streams import as_frames

    model = unwrap(model)
    if not hasattr(model, 'predict_all'):
        raise UsageError(
            f'{type(model).__name__} has no exits to be tested one by one: the loops '
            'AllExitsValLoop and AllExitsTestLoop are for an EarlyExitDetector'
        )
    data = model.data_preprocessor(batch, False)
    by_exit = model.predict_all(data['inputs'], data['data_samples']).detections
    _, samples = as_frames(data['inputs'], data['data_samples'])
    for row, sample in enumerate(samples):
        sample.exits = [detections[row] for detections in by_exit]
        sample.pred_instances = sample.exits[-1]
    return samples


class _AllExits:
    """What both loops do with a batch."""

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        name = 'val' if isinstance(self, ValLoop) else 'test'
        self.runner.call_hook(f'before_{name}_iter', batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = all_exits_step(self.runner.model, data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook(
            f'after_{name}_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs
        )


@LOOPS.register_module()
class AllExitsValLoop(_AllExits, ValLoop):
    """mmengine's validation, every frame through every exit of an `EarlyExitDetector`."""


@LOOPS.register_module()
class AllExitsTestLoop(_AllExits, TestLoop):
    """mmengine's test, every frame through every exit of an `EarlyExitDetector`."""


@METRICS.register_module()
class ExitsMetric(BaseMetric):
    """COCO's box AP of each exit: ``exit00/bbox_mAP``, ``exit00/bbox_mAP_50``, ... and, under
    mmdet's own names, ``coco/bbox_mAP``, ... of the last one.

    Args:
        ann_file (str): COCO annotations.
        classwise (bool): Whether to log AP by class as well. Defaults to False.
        metric_items (Sequence[str]): What to give of each exit, as of `CocoMetric`. Defaults to mAP
            and mAP_50.
        collect_device (str): As of `CocoMetric`. Defaults to 'cpu'.
    """

    #: For `datasets.annotation_repair`, which lets those that do read a mended file.
    reads_coco_annotations = True

    def __init__(
        self,
        ann_file: str,
        classwise: bool = False,
        metric_items: Sequence[str] = ('mAP', 'mAP_50'),
        collect_device: str = 'cpu',
    ) -> None:
        super().__init__(collect_device=collect_device)
        self._items = tuple(metric_items)
        self._new = lambda: CocoMetric(
            ann_file=ann_file,
            classwise=classwise,
            metric_items=list(metric_items),
            collect_device=collect_device,
        )
        self._exits: list[CocoMetric] = []

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Take the ``exits`` of each sample."""
        for sample in data_samples:
            if 'exits' not in sample:
                raise UsageError(
                    'ExitsMetric needs the detections of all exits: val_cfg = '
                    "dict(type='AllExitsValLoop')"
                    ", test_cfg = dict(type='AllExitsTestLoop')"
                )
            while len(self._exits) < len(sample['exits']):
                self._exits.append(self._new())
            for metric, instances in zip(self._exits, sample['exits']):
                metric.process(data_batch, [dict(sample, pred_instances=instances)])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Not used: each exit has a metric of its own."""
        raise NotImplementedError

    def evaluate(self, size: int) -> dict[str, float]:
        """AP of all exits; the results of all ranks are put together.

        Args:
            size (int): Frames of the whole data set.
        """
        metrics: dict[str, float] = {}
        for exit, metric in enumerate(self._exits):
            metric.dataset_meta = self.dataset_meta
            # Where no frame has a detection CocoMetric gives nothing; that is an AP of 0.
            exit_metrics = {f'coco/bbox_{item}': 0.0 for item in self._items}
            with contextlib.redirect_stdout(io.StringIO()):
                exit_metrics.update(metric.evaluate(size))
            metrics.update(
                {
                    name.replace('coco/', f'exit{exit:02d}/'): value
                    for name, value in exit_metrics.items()
                }
            )
        if self._exits:
            metrics.update(exit_metrics)
        return metrics


def exit_of(name: str) -> int | None:
    """The number in ``exit03/bbox_mAP``; None if there is none."""
    head = name.split('/')[0]
    return int(head[4:]) if head.startswith('exit') and head[4:].isdigit() else None
