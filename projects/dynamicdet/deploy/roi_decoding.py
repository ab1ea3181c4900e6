"""Proposals, RoIs and their NMS in two-stage detectors, on tensors alone, so that a graph can hold
them. As `decoding`, for one image.

Letters: R regions, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from mmcv.ops import RoIAlign
from torch import Tensor, nn

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from ..errors import UsageError
from ..private_mmdet import decodes_as
from .decoding import (
    Candidates,
    Frame,
    best_candidates,
    build_nms,
    decode_boxes,
    level_priors,
    rows_of,
)
from .graph_operators import roi_align


def build_roi_decoder(
    branch: nn.Module, masks: bool = False
) -> Callable[[Sequence[Tensor], Frame], Candidates]:
    """What makes detections of a two-stage detector's neck maps, (1, C_i, H_i, W_i), as mmdet with
    ``rescale=True``.

    Args:
        branch (nn.Module): With an ``rpn_head`` and a ``roi_head``: Faster, Mask or Cascade R-CNN.
        masks (bool): Whether boxes have masks, (D, h, w), in [0, 1], which are not pasted into the
            image yet. Defaults to False.

    Returns:
        Callable: Maps and a `Frame` -> `Candidates` that NMS left, in the original image's frame,
        best first.

    Raises:
        UsageError: If it is built in another way.
    """
    _require_known(branch, masks)
    roi_head, cfg = branch.roi_head, branch.roi_head.test_cfg
    propose = _build_proposals(branch.rpn_head)
    suppress = build_nms(cfg.get('nms'), type(roi_head).__name__)
    # With masks, mmdet scales boxes behind the NMS.
    late = roi_head.with_mask

    def detect(maps: Sequence[Tensor], frame: Frame) -> Candidates:
        regions, scores, raw = _refined(roi_head, maps, propose(maps, frame), frame)
        boxes = _boxes_by_class(_each(roi_head.bbox_head)[-1], regions, raw, frame)
        count = scores.shape[1]
        labels = torch.arange(count).expand(scores.shape[0], count).reshape(-1)
        unscaled = frame.scale.repeat(2)
        found = Candidates(boxes if late else boxes / unscaled, scores.reshape(-1), labels)
        found = found.where(found.scores > cfg.score_thr)
        found = found.where(suppress(found))
        most = cfg.max_per_img
        boxes, scores, labels = found.boxes[:most], found.scores[:most], found.labels[:most]
        shapes = _masks(roi_head, maps, boxes, labels) if masks else None
        return Candidates(boxes / unscaled if late else boxes, scores, labels, shapes)

    return detect


def _require_known(branch: nn.Module, masks: bool) -> None:
    roi_head = branch.roi_head
    heads, extractors = (_each(part) for part in (roi_head.bbox_head, roi_head.bbox_roi_extractor))
    if masks:
        extractors += _each(roi_head.mask_roi_extractor)
        if not all(decodes_as(head, FCNMaskHead) for head in _each(roi_head.mask_head)):
            raise UsageError(
                f'{type(_each(roi_head.mask_head)[0]).__name__} cannot be exported with '
                '--standalone: it makes masks in a way of its own; export it without --standalone'
            )
    known = (
        type(roi_head) in (StandardRoIHead, CascadeRoIHead)
        and type(branch.rpn_head) is RPNHead
        and not roi_head.with_shared_head
        and all(type(extractor) is SingleRoIExtractor for extractor in extractors)
        and all(
            type(layer) is RoIAlign and layer.pool_mode == 'avg'
            for extractor in extractors
            for layer in extractor.roi_layers
        )
        and all(
            decodes_as(head, BBoxHead) and not head.custom_cls_channels and head.with_reg
            for head in heads
        )
        and branch.rpn_head.test_cfg.get('max_per_img', 0) > 0
        and branch.rpn_head.test_cfg.get('nms_pre', 0) > 0
        and roi_head.test_cfg.get('max_per_img', 0) > 0
    )
    if not known:
        raise UsageError(
            f'{type(branch).__name__} with {type(roi_head).__name__} and '
            f'{type(heads[-1]).__name__} cannot be exported with --standalone: only Faster, Mask '
            'and Cascade R-CNN as mmdet builds them; export it without --standalone'
        )


def _each(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _build_proposals(head: RPNHead) -> Callable[[Sequence[Tensor], Frame], Tensor]:
    """Maps to regions, (R, 4), as `RPNHead` proposes them."""
    cfg = head.test_cfg
    suppress, smallest = build_nms(cfg.nms, 'RPNHead'), cfg.get('min_bbox_size', -1)

    def propose(maps: Sequence[Tensor], frame: Frame) -> Tensor:
        raw_scores, raw_boxes = head(maps)
        levels = []
        for level, priors in enumerate(level_priors(head, raw_scores)):
            raw = rows_of(raw_scores[level], head.cls_out_channels)
            scores = raw.sigmoid() if head.use_sigmoid_cls else raw.softmax(dim=-1)[:, :1]
            scores, _, cells, _ = best_candidates(scores, 0.0, cfg.nms_pre)
            raw = rows_of(raw_boxes[level], head.bbox_coder.encode_size)[cells]
            boxes = decode_boxes(head.bbox_coder, priors[cells], raw, frame)
            levels.append(Candidates(boxes, scores, torch.full_like(cells, level)))
        found = Candidates.join(levels)
        if smallest >= 0:
            sides = found.boxes[:, 2:] - found.boxes[:, :2]
            found = found.where((sides > smallest).all(dim=1))
        return found.boxes[suppress(found)][: cfg.max_per_img]

    return propose


def _refined(
    roi_head: nn.Module, maps: Sequence[Tensor], regions: Tensor, frame: Frame
) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, (R, 4), as the last stage sees them, scores of classes, (R, C), the mean of all
    stages, and the last stage's raw boxes, (R, 4) or (R, C * 4)."""
    heads, extractors = _each(roi_head.bbox_head), _each(roi_head.bbox_roi_extractor)
    total = None
    for stage, (head, extractor) in enumerate(zip(heads, extractors)):
        features, order = _features(extractor, maps, regions)
        # Rows of one level lie together; which region is which row is not asked for.
        regions = regions[order]
        logits, raw = head(features)
        total = logits if total is None else total[order] + logits
        if stage < len(heads) - 1:
            regions = _boxes_of_best(head, regions, logits, raw, frame)
    return regions, (total / len(heads)).softmax(dim=-1)[:, :-1], raw


def _features(
    extractor: SingleRoIExtractor, maps: Sequence[Tensor], regions: Tensor
) -> tuple[Tensor, Tensor]:
    """What regions, (R, 4), look at, (R, C, h, w), in another order, and that order, (R,)."""
    maps = maps[: extractor.num_inputs]
    batch = torch.zeros_like(regions[:, :1])
    levels = extractor.map_roi_levels(torch.cat([batch, regions], dim=1), len(maps))
    features, order = [], []
    for level, (layer, values) in enumerate(zip(extractor.roi_layers, maps)):
        rows = (levels == level).nonzero()[:, 0]
        features.append(roi_align(values, regions[rows], layer))
        order.append(rows)
    return torch.cat(features), torch.cat(order)


def _masks(roi_head: nn.Module, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """Masks of boxes, (D, h, w), of each one's class, the mean of all stages."""
    heads, extractors = _each(roi_head.mask_head), _each(roi_head.mask_roi_extractor)
    stages = []
    for head, extractor in zip(heads, extractors):
        features, order = _features(extractor, maps, boxes)
        # In the order of the boxes again.
        places = order.float().topk(order.shape[0], largest=False)[1]
        stages.append(head(features)[places].sigmoid())
    masks = torch.stack(stages).mean(0) if len(stages) > 1 else stages[0]
    if heads[-1].class_agnostic:
        return masks[:, 0]
    rows = labels[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
    return masks.gather(1, rows)[:, 0]


def _boxes_of_best(
    head: BBoxHead, regions: Tensor, logits: Tensor, raw: Tensor, frame: Frame
) -> Tensor:
    """Regions of the next stage: the box of each one's best class."""
    if not head.reg_class_agnostic:
        best = logits[:, :-1].argmax(dim=1)
        columns = best[:, None] * 4 + torch.arange(4)
        raw = raw.gather(1, columns)
    return decode_boxes(head.bbox_coder, regions, raw, frame)


def _boxes_by_class(head: BBoxHead, regions: Tensor, raw: Tensor, frame: Frame) -> Tensor:
    """Boxes of all classes, (R * C, 4)."""
    classes = head.num_classes
    if head.reg_class_agnostic:
        boxes = decode_boxes(head.bbox_coder, regions, raw, frame)
        return boxes[:, None].expand(boxes.shape[0], classes, 4).reshape(-1, 4)
    every = regions[:, None].expand(regions.shape[0], classes, 4).reshape(-1, 4)
    return decode_boxes(head.bbox_coder, every, raw.reshape(-1, 4), frame)
