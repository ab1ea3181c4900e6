"""A folder that runs without this project, tested by it: as a model of a Runner, and timed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch.utils.data import Dataset

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

from ..errors import UsageError
from ..progress import Progress
from ..routing.budget import Budget
from ..routing.thresholds import ALL_EASY, ALL_HARD, resolve_threshold
from ..timing import time_in_turns
from .graphs import need_for_deployment
from .runtimes import chosen_providers


def is_standalone(folder: str) -> bool:
    """Whether a folder is one that `standalone.export_standalone` wrote."""
    from .standalone_runtime import ABOUT

    return (Path(folder) / ABOUT).is_file()


def open_standalone(folder: str, threads: int = 0, providers: Sequence[str] | None = None) -> Any:
    """A folder's detector, run by this package's own `standalone_runtime` or `standalone_regions`:
    no code of the folder.

    Args:
        folder (str): The folder.
        threads (int): Of ONNX Runtime. Defaults to all.
        providers (Sequence[str], optional): See `runtimes.open_graph`.

    Raises:
        UsageError: If it holds no whole detector, or there is no such provider.
    """
    need_for_deployment('onnxruntime')
    from . import standalone_regions, standalone_runtime

    try:
        about = json.loads((Path(folder) / standalone_runtime.ABOUT).read_text(encoding='utf-8'))
        regions = about['format'] == standalone_regions.FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        # What is wrong is said below.
        regions = False
    runtime = standalone_regions if regions else standalone_runtime
    try:
        return runtime.Detector(folder, threads, chosen_providers(providers))
    except ValueError as error:
        raise UsageError(str(error)) from None


def time_standalone(
    detector: Any, pictures: Sequence[tuple], progress: Progress, rounds: int = 3
) -> list[float]:
    """Median seconds of each exit, of pictures that were delivered, see `delivered`, to their
    detections."""
    thresholds = (None,) if detector.about['threshold'] is None else (ALL_EASY, ALL_HARD)
    runs = {
        exit: lambda picture, threshold=threshold: detector.run(*picture, threshold)
        for exit, threshold in enumerate(thresholds)
    }
    return [*time_in_turns(runs, pictures, torch.device('cpu'), progress, rounds).values()]


def delivered(item: Mapping[str, Any]) -> tuple[np.ndarray, Sequence[float], Sequence[int]]:
    """Of an item of a data set: the picture as the test pipeline delivers it, (3, h, w), the
    factors of its width and height, and its height and width before."""
    meta = item['data_samples'].metainfo
    return item['inputs'].numpy(), meta.get('scale_factor', (1.0, 1.0)), meta['ori_shape'][:2]


def first_pictures(dataset: Dataset, count: int) -> list[tuple]:
    """`delivered` of the first of a data set."""
    return [delivered(dataset[row]) for row in range(min(count, len(dataset)))]


@MODELS.register_module()
class StandaloneDetector(BaseModel):
    """A standalone folder as a Runner tests it: one picture after the other, on the CPU's side of
    whatever computes its graphs.

    Args:
        folder (str): The folder.
        threads (int): Of ONNX Runtime. Defaults to 1.
        providers (Sequence[str], optional): See `runtimes.open_graph`.
        budget (dict, optional): See `Budget.parse`. Defaults to the folder's threshold.
        seconds (Sequence[float], optional): Of each exit, for a budget in time. Defaults to the
            folder's.
        data_preprocessor: None is needed; Runners fill this in.
    """

    def __init__(
        self,
        folder: str,
        threads: int = 1,
        providers: Sequence[str] | None = None,
        budget: dict | None = None,
        seconds: Sequence[float] | None = None,
        data_preprocessor: dict | None = None,
    ) -> None:
        super().__init__()
        self.detector = open_standalone(folder, threads, providers)
        about, wanted = self.detector.about, Budget.parse(budget)
        self.threshold = about['threshold']
        if wanted is not None:
            if self.threshold is None:
                raise UsageError(f"'{folder}' holds a plain detector, which has no budget")
            self.threshold = self._threshold_for(wanted, seconds)

    def _threshold_for(self, budget: Budget, seconds: Sequence[float] | None) -> float:
        about = self.detector.about
        if 'regions' not in about:
            costs = seconds or about['seconds'], about['gflops']
            return resolve_threshold(budget, about['difficulties'], *costs)
        if budget.kind not in ('threshold', 'hard_share'):
            raise UsageError(
                f'{budget.kind} is no budget of regions without the checkpoint: give hard_share, '
                'the share of pixels'
            )
        try:
            return self.detector.threshold_for(**{budget.kind: budget.value})
        except ValueError as error:
            raise UsageError(str(error)) from None

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'predict') -> Any:
        """Of no use: graphs begin with the picture."""
        raise NotImplementedError('a standalone detector has test_step alone')

    def test_step(self, data: Mapping[str, Any]) -> list[DetDataSample]:
        """Detections of a batch as a loader gives it, in its data samples."""
        for inputs, sample in zip(data['inputs'], data['data_samples']):
            picture = delivered(dict(inputs=inputs.cpu(), data_samples=sample))
            found = self.detector.run(*picture, self.threshold)
            sample.pred_instances = InstanceData(
                bboxes=torch.from_numpy(found.boxes),
                scores=torch.from_numpy(found.scores),
                labels=torch.from_numpy(found.labels),
            )
            if found.masks is not None:
                sample.pred_instances.masks = torch.from_numpy(self._pasted(found, picture[2]))
            sample.set_metainfo(dict(difficulty=found.difficulty, exit=found.exit))
            if 'regions' in self.detector.about:
                sample.set_metainfo(dict(regions=found.regions))
        return data['data_samples']

    def _pasted(self, found: Any, size: Sequence[int]) -> np.ndarray:
        from .standalone_runtime import pasted

        masks = np.zeros((len(found.masks), *size), bool)
        for row, (mask, box) in enumerate(zip(found.masks, found.boxes)):
            masks[row] = pasted(mask, box, *size) >= self.detector.about['mask_threshold']
        return masks

    val_step = test_step
