"""Count what detectors cost: parameters, and floating point operations for one image.

One multiply-add is two operations: FLOPs here are 2 x multiply-adds, as in papers about YOLO;
mmdet, Swin and CBNetV2 call the multiply-adds FLOPs. torch counts convolutions, linear layers and
matrix products where they run. It does not count norms, activations and resizing, as some counters
do, nor mmcv's own operators: RoIAlign, and of deformable attention and convolution all but the
linear layers and convolutions around them.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

from ..errors import UsageError
from ..models import DynamicDetector
from ..models.composite.composite import ORDINALS, CompositeBackbone
from ..models.resolution import reduce_samples
from ..private_torch import FUSED_CONVOLUTION, FUSED_SUM_CONVOLUTION, ShapesOnly
from ..testing import randomize

#: Height and width at which mmdet, Swin and CBNetV2 state what detectors of 1333 x 800 pixels cost.
MMDET_SHAPE = (800, 1280)


def _packed_flops(x_shape, w_shape, *_, out_shape, **__) -> int:
    return conv_flop_count(x_shape, w_shape, out_shape)


def _packed_sum_flops(_, x_shape, w_shape, *__, out_shape, **___) -> int:
    return conv_flop_count(x_shape, w_shape, out_shape)


#: How fused models run their convolutions on a CPU; see `models.fusing`.
_PACKED = {
    operator: count
    for operator, count in (
        (FUSED_CONVOLUTION, _packed_flops),
        (FUSED_SUM_CONVOLUTION, _packed_sum_flops),
    )
    if operator is not None
}


class PartCost(NamedTuple):
    """Parameters of a part of a detector, and its FLOPs for one image."""

    parameters: int
    flops: int


class Costs(NamedTuple):
    """What a detector costs for one image.

    Attributes:
        parts (dict[str, PartCost]): In the order in which they run. What is shared counts where
            it runs first, so that the parameters add up to the detector's.
        exits (tuple[PartCost, ...]): All that each exit needs, from exit 0 on; of a stock detector
            its own.
        rois (dict[str, int]): How many regions the heads of a two-stage detector were given:
            ``boxes`` and, where there are masks, ``masks``.
    """

    parts: dict[str, PartCost]
    exits: tuple[PartCost, ...]
    rois: dict[str, int]

    def at(self, hard_share: float) -> float:
        """FLOPs per image, in the mean, where this share of the images, in [0, 1], is hard."""
        return (1 - hard_share) * self.exits[0].flops + hard_share * self.exits[-1].flops


def count_flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call, and what it returns."""
    with FlopCounterMode(display=False, custom_mapping=_PACKED) as counter:
        result = run()
    return counter.get_total_flops(), result


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of modules, trained and frozen; those that are shared count once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def build_detector(cfg: Config) -> BaseDetector:
    """Build a config's detector, dynamic or not, as `measure_costs` wants it: in eval mode, with
    random weights where they matter. Two-stage detectors keep all the boxes they may: the cost of a
    mask head is that of a full image."""
    init_default_scope('mmdet')
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    for detector in model.branches if isinstance(model, DynamicDetector) else [model]:
        if _needs_values(detector):
            randomize(detector)
        if _is_two_stage(detector):
            detector.roi_head.test_cfg.score_thr = 0
    return model


def stated_shape(cfg: Config) -> tuple[int, int]:
    """Height and width at which papers state what a config's detector costs: its own test size if
    that is square, as YOLO's are, else `MMDET_SHAPE`."""
    for step in cfg.get('test_dataloader', {}).get('dataset', {}).get('pipeline', []):
        scale = step.get('scale') or step.get('img_scale')
        if isinstance(scale, (list, tuple)) and len(scale) == 2 and scale[0] == scale[1]:
            return tuple(scale)
    return MMDET_SHAPE


@torch.no_grad()
def measure_costs(model: BaseDetector, shape: Sequence[int]) -> Costs:
    """Run a detector, all its parts, on noise, and count.

    One-stage detectors run up to their raw outputs; two-stage ones up to their detections, since
    what their heads cost follows from the proposals. Where shapes are enough, nothing is computed.

    Args:
        model (BaseDetector): From `build_detector`.
        shape (Sequence[int]): Height and width, multiples of 32.

    Raises:
        UsageError: If the shape is none.
    """
    stride = max(32, getattr(model.data_preprocessor, 'pad_size_divisor', 1))
    if min(shape) < stride or any(side % stride for side in shape):
        raise UsageError(
            f'height and width must be multiples of {stride}; got {shape[0]} {shape[1]}'
        )
    if isinstance(model, DynamicDetector):
        return _dynamic_costs(model, shape)
    flops, rois = _run_detector(model, (1, 3, *shape), _sample(shape))
    whole = PartCost(count_parameters(model), flops)
    return Costs(dict(detector=whole), (whole,), rois)


def _dynamic_costs(model: DynamicDetector, shape: Sequence[int]) -> Costs:
    """All parts once, whatever the difficulty."""
    net, sample = model.backbone, _sample(shape)
    with _shapes_only(net):
        images = _noise((1, 3, *shape))
        smaller, ratio = model.exit_images(0, images)
        flops, maps = count_flops(lambda: net.first_maps(smaller))
        router = PartCost(
            count_parameters(model.router), count_flops(lambda: model.router(maps))[0]
        )
        backbone_costs = [(flops, _shapes(net.select(maps)), ratio)]
        for exit in range(1, model.num_exits):
            _, ratio = model.exit_images(exit, images)
            flops, maps = count_flops(lambda: model.deeper_maps(exit, images, maps))
            backbone_costs.append((flops, _shapes(net.select(maps)), ratio))
    parts, exits, used, run = {}, [], [model.router], router.flops
    passed: list[nn.Module] = []
    for exit, (flops, shapes, ratio) in enumerate(backbone_costs):
        # Shared heads cost the same where they see as much.
        if exit == 0 or len(model.branches) > 1 or shapes != backbone_costs[exit - 1][1]:
            heads, rois = _run_detector(
                model.branch(exit), shapes, *reduce_samples([sample], ratio)
            )
        name, backbone_parts = _backbone_of(net, exit)
        parts[name] = PartCost(count_parameters(*backbone_parts), flops)
        if exit == 0:
            parts['router'] = router
        own_branch = count_parameters(*model.branches[exit : exit + 1])
        parts[f'{ORDINALS[exit]} neck and heads'] = PartCost(own_branch, heads)
        used, run = [*used, *backbone_parts], run + flops
        exits.append(PartCost(count_parameters(*used, *passed, model.branch(exit)), run + heads))
        # Each exit runs its own neck and heads; of those before, only where exits are merged.
        if model.merge:
            passed, run = [*passed, model.branch(exit)], run + heads
    return Costs(parts, tuple(exits), rois)


def _backbone_of(net: CompositeBackbone, exit: int) -> tuple[str, list[nn.Module]]:
    """What an exit runs before its neck: a name, and the modules that no earlier exit has."""
    if exit >= len(net.names):
        return 'first backbone again', []
    if exit == 0:
        return 'first backbone', net.nets[:1]
    if not len(net.connections):
        return f'{ORDINALS[exit]} backbone', [net.nets[exit]]
    each = len(net.connections) // (len(net.names) - 1)
    return (
        f'{ORDINALS[exit]} backbone, connections',
        [net.nets[exit], *net.connections[(exit - 1) * each : exit * each]],
    )


def _run_detector(
    detector: BaseDetector, shapes: Any, sample: DetDataSample
) -> tuple[int, dict[str, int]]:
    """FLOPs of a detector on noise, and the regions that its heads were given.

    Args:
        detector (BaseDetector): A branch, or a stock detector.
        shapes (tuple): Of the image; of a branch a list, of the maps.
        sample (DetDataSample): The image's.
    """
    two_stage, rois = _is_two_stage(detector), {}
    hooks = _watch_rois(detector, rois) if two_stage else []
    run = detector.predict if two_stage else detector._forward
    with _shapes_only(detector):
        inputs = tuple(map(_noise, shapes)) if isinstance(shapes, list) else _noise(shapes)
        flops, _ = count_flops(lambda: run(inputs, [sample]))
    for hook in hooks:
        hook.remove()
    return flops, rois


def _needs_values(module: nn.Module) -> bool:
    """Whether mmcv's own operators are in it, which know no tensors without values."""
    return any(type(part).__module__.startswith('mmcv.ops') for part in module.modules())


def _shapes_only(module: nn.Module) -> contextlib.AbstractContextManager:
    """Tensors made inside have no values, and cost no time, where the module can do without."""
    if _needs_values(module):
        return contextlib.nullcontext()
    return ShapesOnly(allow_non_fake_inputs=True)


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _shapes(maps: Sequence[Tensor]) -> list[torch.Size]:
    return [m.shape for m in maps]


def _is_two_stage(detector: BaseDetector) -> bool:
    return getattr(detector, 'with_roi_head', False)


def _sample(shape: Sequence[int]) -> DetDataSample:
    size = tuple(shape)
    return DetDataSample(
        metainfo=dict(
            img_id=0,
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )


def _watch_rois(detector: BaseDetector, rois: dict[str, int]) -> list[Any]:
    """Note how many regions a detector's RoI heads are given, in the dict."""

    def watch(kind: str) -> Callable:
        return lambda module, inputs: rois.update({kind: len(inputs[0])})

    hooks = []
    for kind, name in (('boxes', 'bbox_head'), ('masks', 'mask_head')):
        heads = getattr(detector.roi_head, name, None) or []
        for head in heads if isinstance(heads, (list, nn.ModuleList)) else [heads]:
            hooks.append(head.register_forward_pre_hook(watch(kind)))
    return hooks
