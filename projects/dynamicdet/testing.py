"""Real mmdet configs, shrunk until a CPU runs them in a second; and inputs for them."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment

from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks

from .models import build_composite

#: Stock config of each kind of detector that the tests make dynamic.
STOCK = dict(
    faster_rcnn='mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    mask_rcnn='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    cascade_rcnn='mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    retinanet='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    fcos='mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    atss='mmdet::atss/atss_r50_fpn_1x_coco.py',
    gfl='mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    yolox='mmdet::yolox/yolox_s_8xb8-300e_coco.py',
)

#: Width of a shrunk neck and of the heads on it: two channels for each of GroupNorm's 32 groups.
_WIDTH = 64
_NARROW = dict(
    in_channels=_WIDTH,
    out_channels=_WIDTH,
    feat_channels=_WIDTH,
    conv_out_channels=_WIDTH,
    fc_out_channels=64,
    num_classes=3,
)


def _narrow(node: Any) -> Any:
    """Replace, anywhere below, widths of 128 or more and the number of classes."""
    if isinstance(node, dict):
        for key, value in node.items():
            wide = (
                key in _NARROW
                and isinstance(value, int)
                and (value >= 128 or key == 'num_classes' and value == 80)
            )
            node[key] = _NARROW[key] if wide else _narrow(value)
    elif isinstance(node, (list, tuple)):
        return type(node)(_narrow(item) for item in node)
    return node


def tiny_backbone(out_indices: Sequence[int] = (0, 1, 2, 3), **settings) -> ConfigDict:
    """A ResNet-18 with 8, 16, 32 and 64 channels."""
    return ConfigDict(
        type='ResNet',
        depth=18,
        base_channels=8,
        out_indices=tuple(out_indices),
        init_cfg=None,
        **settings,
    )


def tiny_detector(name: str) -> ConfigDict:
    """The model config of a stock mmdet detector, shrunk, on a ResNet.

    Args:
        name (str): A key of `STOCK`.
    """
    model = get_config(STOCK[name]).model
    out_indices = model.backbone.get('out_indices', (0, 1, 2, 3))
    if model.backbone.type != 'ResNet':
        # A ResNet stands in; its stages 1 to 3 have the strides 8 to 32 that YOLOX expects.
        out_indices = (1, 2, 3)
        model.data_preprocessor.batch_augments = None
    model.backbone = tiny_backbone(out_indices)
    model.init_cfg = None
    model = _narrow(model)
    model.neck.in_channels = [8 * 2**index for index in out_indices]
    _propose_little(model)
    return model


def _propose_little(detector: ConfigDict) -> None:
    for cfg in (detector.get('test_cfg'), detector.get('train_cfg')):
        for stage in ('rpn', 'rpn_proposal'):
            if cfg and cfg.get(stage) and 'max_per_img' in cfg[stage]:
                cfg[stage].update(nms_pre=100, max_per_img=50)


def tiny_dynamic(name: str, **settings) -> ConfigDict:
    """A dynamic detector's model config over `tiny_detector`."""
    detector = tiny_detector(name)
    return ConfigDict(
        type='DynamicDetector', detector=detector, backbone=detector.backbone, **settings
    )


#: What makes each part small that has no width to narrow.
_SMALL = dict(
    ResNet=dict(depth=18, base_channels=8),
    ResNeXt=dict(depth=50, groups=4, base_width=4, base_channels=16),
    CSPDarknet=dict(deepen_factor=0.1, widen_factor=0.125),
    CSPNeXt=dict(deepen_factor=0.1, widen_factor=0.125),
    SwinTransformer=dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    YOLOV5Backbone=dict(width=0.25, depth=0.25),
    YOLOV5PAFPN=dict(width=0.25, depth=0.25),
    YOLOV5Head=dict(width=0.25),
    YOLOV7Backbone=dict(width=0.125, depth=0.25),
    YOLOV7PAFPN=dict(width=0.125, depth=0.25),
    YOLOV7Head=dict(width=0.125),
)


def shrink(model: ConfigDict) -> ConfigDict:
    """A small copy of the model of any shipped config, dynamic or not: the same parts, narrower and
    shallower, without pretrained weights and without what needs a Runner."""
    model = copy.deepcopy(model)
    if isinstance(model.get('detector'), (list, tuple)):
        model.detector = [shrink(detector) for detector in model.detector]
        model.backbone = [detector.backbone for detector in model.detector]
        return model
    detector = model.get('detector', model)
    if 'encoder' in detector:
        # DINO's width is a constant in mmdet. As many queries as three classes need for its 300
        # results.
        detector.encoder.num_layers = detector.decoder.num_layers = 1
        detector.num_queries = 100
        detector.bbox_head.num_classes = 3
    else:
        _narrow(detector)
    for part in (model.backbone, detector.backbone, detector.neck, detector.get('bbox_head', {})):
        part.update(_SMALL.get(part.get('type'), {}))
        part.pop('init_cfg', None)
    if 'in_channels' in detector.neck:
        composite = build_composite(model.backbone, reuse_stages=0)
        detector.neck.in_channels = [composite.channels[index] for index in composite.out_indices]
    _propose_little(detector)
    detector.data_preprocessor.batch_augments = None
    return model


def tiny_batch(
    objects: Sequence[int] = (2, 1),
    size: Sequence[int] = (96, 128),
    seed: int = 0,
    masks: bool = True,
) -> dict:
    """A batch as a data loader gives it.

    Args:
        objects (Sequence[int]): Number of annotated objects of each image; sets the batch size.
        size (Sequence[int]): Height and width.
        seed (int): Seed of pixels and boxes.
        masks (bool): Whether objects have masks.

    Returns:
        dict: ``inputs``, a list of uint8 (3, H, W), and ``data_samples``.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    inputs: list[torch.Tensor] = []
    samples: list[DetDataSample] = []
    for index, count in enumerate(objects):
        inputs.append(torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
        corner = rng.random((count, 2)) * 0.5 * (width, height)
        extent = (0.2 + 0.3 * rng.random((count, 2))) * (width, height)
        boxes = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
        instances = InstanceData(
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, 3, count))
        )
        if masks:
            instances.masks = BitmapMasks(_box_masks(boxes, height, width), height, width)
        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                img_path=f'{index}.jpg',
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = instances
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def _box_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
        mask[top:bottom, left:right] = 1
    return masks


#: Entries that hold settings, not weights.
_KEPT = (
    'threshold',
    'thresholds',
    'operating_points',
    'delta',
    'gains',
    'difficulties',
    'latencies',
    'platt_scale',
    'platt_shift',
    'gflops',
    'class_weights',
    'curve',
    'mean',
    'std',
    'before_mean',
    'before_std',
    'after_mean',
    'after_std',
    'project',
    'anchors',
)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and statistic a value that depends on the seed, none of them zero.

    Fresh detectors have zero-initialized norms, under which much of a network does nothing.
    Activations stay near unit size, regressed boxes near their anchors.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = list(model.named_parameters()) + list(model.named_buffers())
    with torch.no_grad():
        for name, value in entries:
            parts = name.split('.')
            if not value.is_floating_point() or parts[-1] in _KEPT:
                continue
            noise = torch.randn(value.shape, generator=generator)
            regresses = 'reg' in name and 'reg_convs' not in name
            if parts[-1] == 'running_var':
                value.copy_(1 + 0.1 * noise.abs())
            elif value.dim() > 1:
                small = 0.1 if regresses or parts[0] == 'router' else 1
                value.copy_(small * noise * (2 / value[0].numel()) ** 0.5)
            elif parts[-1] == 'weight':
                # What a residual branch or a connection adds must not drown what it is added to.
                adds = parts[-2] in ('bn2', 'bn3') or 'connections' in parts
                value.copy_((0.3 if adds else 1) * (1 + 0.1 * noise))
            else:
                # Negative distances to a box's sides would make no box.
                value.copy_(0.1 * (noise.abs() if regresses else noise))
    return model


class Agreement(NamedTuple):
    """How far two sets of detections of the same images agree; see `agreement`.

    Attributes:
        detections (int): Of both sides, all together.
        unmatched (float): Share of them, in [0, 1], that have no counterpart on the other side.
        box (float): Largest difference of a box's side between counterparts, in pixels.
        score (float): Largest difference of their scores.
    """

    detections: int
    unmatched: float
    box: float
    score: float


def agreement(
    ones: Sequence[Sequence[dict]],
    others: Sequence[Sequence[dict]],
    near: float = 2.0,
    alike: float = 0.1,
) -> Agreement:
    """Compare detections, whatever their order: by image, those of one category are paired so that
    boxes and scores differ least.

    Args:
        ones, others (Sequence[Sequence[dict]]): Per image COCO results: ``bbox`` [x, y, w, h],
            ``score``, ``category_id``.
        near (float): Counterparts' boxes differ by at most so many pixels. Defaults to 2.
        alike (float): And their scores by at most so much. Defaults to 0.1.
    """
    pairs, count = [], 0
    for first, other in zip(ones, others, strict=True):
        count += len(first) + len(other)
        if first and other:
            pairs.append(_counterparts(first, other, near, alike))
    box, score = np.concatenate([np.zeros((0, 2)), *pairs]).T
    return Agreement(
        count,
        1 - 2 * len(box) / count if count else 0.0,
        float(box.max(initial=0)),
        float(score.max(initial=0)),
    )


def _counterparts(
    first: Sequence[dict], other: Sequence[dict], near: float, alike: float
) -> np.ndarray:
    """Differences of box and score of each pair, (n, 2)."""
    boxes, scores, labels = zip(
        *(
            (
                np.array([detection['bbox'] for detection in side]),
                np.array([detection['score'] for detection in side]),
                np.array([detection['category_id'] for detection in side]),
            )
            for side in (first, other)
        )
    )
    ends = boxes[0][:, None], boxes[1]
    # Random weights may make infinite boxes, which are equal.
    with np.errstate(invalid='ignore'):
        box = np.where(ends[0] == ends[1], 0, np.abs(ends[0] - ends[1])).max(-1)
    score = np.abs(scores[0][:, None] - scores[1])
    possible = (box <= near) & (score <= alike) & (labels[0][:, None] == labels[1])
    # What cannot be costs more than all that can.
    cost = np.where(possible, box / near + score / alike, 2.0 * (1 + min(box.shape)))
    rows, columns = linear_sum_assignment(cost)
    kept = possible[rows, columns]
    return np.stack([box[rows, columns][kept], score[rows, columns][kept]], 1)


def count_waits(run: Callable[[], Any]) -> Counter:
    """What makes the CPU wait for the GPU while something runs.

    Args:
        run (Callable): It should have run before: first calls wait for more.

    Returns:
        Counter: How often, by ``file:line`` of Python.
    """
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            run()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return Counter(
        f'{warning.filename}:{warning.lineno}'
        for warning in said
        if 'synchroniz' in str(warning.message)
    )
