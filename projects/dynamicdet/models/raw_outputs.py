"""Raw outputs of mmdet's detectors, for tracing which channels are coupled; see
`compression.coupling`."""

from collections.abc import Callable
from typing import Any

from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample

from ..compression.coupling import OUTPUT_RULES
from ..errors import UsageError
from .dynamic_detector import DynamicDetector

#: Sides of the regions that a two-stage detector's heads are traced with: two for each level of its
#: maps, since torch-pruning takes what autograd does with a single one for a flattening.
_SIDES = (32.0, 33.0, 150.0, 151.0, 300.0, 301.0, 600.0, 601.0)


def detector_outputs(model: BaseDetector, images: Tensor, routed: Callable | None = None) -> list:
    """As of `compression.coupling.raw_outputs`, in containers."""
    if not isinstance(model, DynamicDetector):
        if not hasattr(model, 'backbone'):
            raise _unknown(model)
        return [_heads(model, model.backbone(images))]
    if model.router.sees_detections:
        raise UsageError(
            "a detector whose router sees exit 0's detections keeps its channels: remove them "
            'first, and fit the router then'
        )
    maps = model.backbone.first_maps(images)
    outputs = [(routed or (lambda maps: model.router.logits(model.router.pool(maps))))(maps)]
    for exit in range(model.num_exits):
        maps = model.deeper_maps(exit, images, maps) if exit else maps
        outputs.append(_heads(model.branch(exit), model.backbone.select(maps)))
    return outputs


def _heads(detector: BaseDetector, maps: tuple[Tensor, ...]) -> Any:
    maps = detector.neck(maps) if detector.with_neck else maps
    if getattr(detector, 'with_rpn', False) and detector.with_roi_head:
        boxes = maps[0].new_tensor([[0, 0, side, side] for side in _SIDES])
        regions = [InstanceData(bboxes=boxes) for _ in range(len(maps[0]))]
        samples = [DetDataSample(metainfo=dict(img_shape=(600, 600))) for _ in regions]
        return detector.rpn_head(maps), detector.roi_head.forward(maps, regions, samples)
    if not hasattr(detector, 'bbox_head') or hasattr(detector, 'encoder'):
        raise _unknown(detector)
    return detector.bbox_head(maps)


def _unknown(detector: BaseDetector) -> UsageError:
    return UsageError(
        f'channels of a {type(detector).__name__} cannot be removed: only those of one-stage and '
        'two-stage detectors of convolutions, plain or dynamic, can'
    )


OUTPUT_RULES[BaseDetector] = detector_outputs
