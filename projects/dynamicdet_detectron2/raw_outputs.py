"""Raw outputs of Detectron2's detectors, for tracing which channels are coupled; see
`dynamicdet.compression.coupling`."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from torch import Tensor, nn

from dynamicdet.compression.coupling import OUTPUT_RULES, TRACED_RULES
from dynamicdet.compression.shrinking import (
    CHANNEL_RULES,
    ChannelRule,
    KeptChannels,
    select_channels,
)
from dynamicdet.errors import UsageError

from .dynamic_detector import DynamicDetector

#: Sides of the regions that a two-stage detector's heads are traced with: two for each level of its
#: maps, since torch-pruning takes what autograd does with a single one for a flattening.
_SIDES = (32.0, 33.0, 150.0, 151.0, 300.0, 301.0, 600.0, 601.0)


def detector_outputs(
    model: nn.Module, images: Tensor, routed: Callable | None = None
) -> Sequence[Any]:
    """As of `compression.coupling.raw_outputs`, in containers."""
    if not isinstance(model, DynamicDetector):
        return [_heads(model, model.backbone(images))]
    maps = model.backbone.first_maps(images)
    outputs = [(routed or (lambda maps: model.router.logits(model.router.pool(maps))))(maps)]
    for exit in range(model.num_exits):
        maps = model.deeper_maps(exit, images, maps)[0] if exit else maps
        branch = model.branch(exit)
        outputs.append(_heads(branch, branch.backbone(model.backbone.select(maps))))
    return outputs


def _heads(branch: nn.Module, maps: dict[str, Tensor]) -> Any:
    proposals, roi_heads = (
        getattr(branch, key, None) for key in ('proposal_generator', 'roi_heads')
    )
    if proposals is None:
        return branch.head([maps[name] for name in branch.head_in_features])
    if not hasattr(proposals, 'rpn_head') or not hasattr(roi_heads, 'box_pooler'):
        raise UsageError(
            f'channels of a {type(branch).__name__} with {type(roi_heads).__name__} cannot be '
            'removed: only those of RetinaNet, FCOS and R-CNNs on a pyramid can'
        )
    outputs = [proposals.rpn_head([maps[name] for name in proposals.in_features])]
    count = len(next(iter(maps.values())))
    corners = [[0, 0, side, side] for side in _SIDES]
    regions = [Boxes(next(iter(maps.values())).new_tensor(corners)) for _ in range(count)]
    seen = [maps[name] for name in roi_heads.box_in_features]
    heads, predictors = (
        list(value) if isinstance(value, nn.ModuleList) else [value]
        for value in (roi_heads.box_head, roi_heads.box_predictor)
    )
    pooled = roi_heads.box_pooler(seen, regions)
    outputs += [predictor(head(pooled)) for head, predictor in zip(heads, predictors)]
    for kind in ('mask', 'keypoint'):
        if getattr(roi_heads, f'{kind}_on', False):
            pooler, head = (getattr(roi_heads, f'{kind}_{part}') for part in ('pooler', 'head'))
            seen = [maps[name] for name in getattr(roi_heads, f'{kind}_in_features')]
            outputs.append(head.layers(pooler(seen, regions)))
    if hasattr(branch, 'sem_seg_head'):
        outputs.append(branch.sem_seg_head.layers(maps))
    return outputs


for _kind in (DynamicDetector, GeneralizedRCNN, DenseDetector):
    OUTPUT_RULES[_kind] = detector_outputs


def _shrink_frozen(norm: FrozenBatchNorm2d, kept: KeptChannels) -> None:
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        select_channels(norm, name, 0, kept.leaving)
    norm.num_features = len(norm.weight)


CHANNEL_RULES[FrozenBatchNorm2d] = ChannelRule(lambda norm: norm.num_features, _shrink_frozen)


class _Apart(Conv2d):
    """A convolution whose norm and activation are behind it, not in it: torch-pruning watches what
    a module gives."""

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, x)


def make_traceable(model: nn.Module) -> None:
    """Show torch-pruning Detectron2's layers as torch has them, in place."""
    for module in list(model.modules()):
        if type(module) is Conv2d:
            module.__class__ = _Apart
        for name, child in module.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features, child.eps).eval())


TRACED_RULES.append(make_traceable)
