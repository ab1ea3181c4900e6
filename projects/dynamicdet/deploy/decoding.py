"""Decoding and NMS of dense heads, on tensors alone, so that a graph can hold them.

What mmdet's heads do for each image in Python, for one image: scores, the best candidates of each
level, boxes, NMS. Sizes may be those of any image.

Letters: C classes, P cells (times anchors) of a level, K candidates, D detections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdet.models.dense_heads import GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, distance2bbox

from ..errors import UsageError
from ..models.yolo import AnchorHead
from ..private_mmdet import decode_yolox, decodes_as
from .graph_operators import nms


@dataclass(frozen=True)
class Frame:
    """What a decoder has to know of an image; scalars are tensors without dimensions.

    Attributes:
        height, width (Tensor): Of the image as the head's exit sees it, with what the pipeline
            padded, without what the batch is padded with. float32.
        scale (Tensor): Factors of width and height from the original image to the one that the
            exit sees, (2,), float32.
        original (Tensor): Height and width of the original image, (2,), float32.
    """

    height: Tensor
    width: Tensor
    scale: Tensor
    original: Tensor


@dataclass(frozen=True)
class Candidates:
    """Boxes before NMS, (K, 4), corners in pixels; their scores, (K,), and labels, (K,), int64; and
    at the end perhaps masks, (K, h, w), in [0, 1]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    @classmethod
    def join(cls, levels: Sequence['Candidates']) -> 'Candidates':
        """Those of all levels, in order."""
        return cls(
            torch.cat([level.boxes for level in levels]),
            torch.cat([level.scores for level in levels]),
            torch.cat([level.labels for level in levels]),
        )

    def where(self, rows: Tensor) -> 'Candidates':
        """Some of them, by a mask or by indices."""
        return Candidates(self.boxes[rows], self.scores[rows], self.labels[rows])


#: A head's outputs for one image -> its candidates, boxes in the frame that the exit sees.
Decoder = Callable[[Sequence[Any], Frame], Candidates]


def build_decoder(head: nn.Module) -> Callable[[Sequence[Any], Frame], Candidates]:
    """What makes detections of a dense head's outputs for one image, as ``predict_by_feat`` of
    mmdet with ``rescale=True``.

    Args:
        head (nn.Module): YOLOX's, GFL's, YOLOv5's or YOLOv7's, or one that decodes as mmdet's
            `BaseDenseHead` does, such as RetinaNet's, FCOS's, ATSS's and RTMDet's.

    Returns:
        Callable: Outputs of ``head.forward`` for a batch of one, and a `Frame` -> `Candidates` that
        NMS left, at most ``max_per_img`` where the head heeds it, boxes in the original image's
        frame, best first.

    Raises:
        UsageError: If the head or a setting of its ``test_cfg`` is none of these.
    """
    cfg = head.test_cfg
    decode = _decoder_of(head, cfg)
    suppress = build_nms(cfg.get('nms'), type(head).__name__)
    smallest = cfg.get('min_bbox_size', -1)
    # YOLOX's own NMS keeps all that it leaves.
    most = None if isinstance(head, YOLOXHead) else cfg.max_per_img

    def detect(outputs: Sequence[Any], frame: Frame) -> Candidates:
        found = decode(outputs, frame)
        found = Candidates(found.boxes / frame.scale.repeat(2), found.scores, found.labels)
        if smallest >= 0 and most is not None:
            sides = found.boxes[:, 2:] - found.boxes[:, :2]
            found = found.where((sides > smallest).all(dim=1))
        found = found.where(suppress(found))
        if most is None:
            return found
        return Candidates(found.boxes[:most], found.scores[:most], found.labels[:most])

    return detect


def _decoder_of(head: nn.Module, cfg: ConfigDict) -> Decoder:
    kind = type(head)
    standard = getattr(kind, '_bbox_post_process', None) is BaseDenseHead._bbox_post_process
    if isinstance(head, YOLOXHead) and kind.predict_by_feat is YOLOXHead.predict_by_feat:
        return lambda outputs, frame: _yolox(head, outputs, cfg.score_thr)
    if isinstance(head, BaseDenseHead) and standard and not _is_of_custom_classes(head):
        _require_count(cfg, kind)
        if isinstance(head, AnchorHead):
            return lambda outputs, frame: _yolo(head, outputs, frame, cfg)
        if kind.predict_by_feat is BaseDenseHead.predict_by_feat:
            if decodes_as(head, GFLHead):
                return lambda outputs, frame: _by_level(_gfl_level, head, outputs, frame, cfg)
            if decodes_as(head, BaseDenseHead):
                return lambda outputs, frame: _by_level(_level, head, outputs, frame, cfg)
    raise UsageError(
        f'{kind.__name__} cannot be exported with --standalone: its boxes are decoded in a way of '
        'its own; export it without --standalone'
    )


def _is_of_custom_classes(head: nn.Module) -> bool:
    return getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False)


def _require_count(cfg: ConfigDict, kind: type) -> None:
    for name in ('nms_pre', 'max_per_img'):
        if not cfg.get(name, 0) > 0:
            raise UsageError(
                f'--standalone needs {name} above 0 in test_cfg of {kind.__name__}: add it by '
                '--cfg-options'
            )


def build_nms(settings: ConfigDict | None, whose: str) -> Callable[[Candidates], Tensor]:
    """NMS as ``mmcv.ops.batched_nms`` does it: classes are moved apart, so that one NMS serves all.

    In a graph it is one ``NonMaxSuppression``.

    Args:
        settings (dict, optional): ``test_cfg.nms``.
        whose (str): The head, for the message.

    Returns:
        Callable: `Candidates` -> indices of those that stay, best first.

    Raises:
        UsageError: If it is of another type or has settings that change scores.
    """
    settings = dict(settings or {})
    known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    if (
        settings.get('type', 'nms') != 'nms'
        or set(settings) - known
        or 'iou_threshold' not in settings
    ):
        raise UsageError(
            f"--standalone needs dict(type='nms', iou_threshold=...) as NMS of {whose}; got "
            f'{settings}: change it by --cfg-options'
        )
    threshold, agnostic = settings['iou_threshold'], settings.get('class_agnostic', False)

    def suppress(found: Candidates) -> Tensor:
        boxes = found.boxes
        if not agnostic:
            # There may be none, of which there is no largest; or none inside the picture.
            largest = torch.cat([boxes.flatten(), boxes.new_full((1,), -1.0)]).max()
            boxes = boxes + (found.labels.to(boxes) * (largest + 1))[:, None]
        return nms(boxes, found.scores, threshold)

    return suppress


def best_candidates(
    scores: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best scores of a level, as ``mmdet.models.utils.filter_scores_and_topk``.

    Args:
        scores (Tensor): (P, C).
        threshold (float): Scores must be above it.
        count (int): How many there may be.

    Returns:
        tuple[Tensor]: Of the best, whether above the threshold or not, so that there is one at
        least: scores, (K,), best first, labels and cells, (K,) each; and which are above, (K,).
    """
    flat = scores.reshape(-1)
    # Both numbers are of the graph, not of the example.
    most = torch.minimum(torch.as_tensor(flat.shape[0]), torch.tensor(count))
    best, at = flat.topk(most)
    cells, labels = split_index(at, scores.shape[1])
    return best, labels, cells, best > threshold


def split_index(at: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, (K,) each, int64, of elements of a matrix, by int32: not all that computes
    graphs has arithmetic on int64."""
    at = at.int()
    rows = torch.div(at, int(width), rounding_mode='trunc')
    return rows.long(), (at - rows * int(width)).long()


def decode_boxes(coder: nn.Module, priors: Tensor, raw: Tensor, frame: Frame) -> Tensor:
    """Boxes, (K, 4), as a coder makes them of priors and raw predictions, clipped to the image
    where the coder does so.

    Raises:
        UsageError: If it is a coder of another kind.
    """
    if type(coder) is DistancePointBBoxCoder:
        boxes = distance2bbox(priors, raw)
    elif type(coder) is DeltaXYWHBBoxCoder:
        boxes = delta2bbox(
            priors,
            raw,
            coder.means,
            coder.stds,
            None,
            16 / 1000,
            coder.clip_border,
            coder.add_ctr_clamp,
            coder.ctr_clamp,
        )
    else:
        raise UsageError(
            f'{type(coder).__name__} cannot be exported with --standalone: export the detector '
            'without it'
        )
    return clip(boxes, frame.height, frame.width) if coder.clip_border else boxes


def clip(boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Boxes, (K, 4), inside an image."""
    return boxes.clamp(min=0).minimum(torch.stack([width, height, width, height]))


def rows_of(values: Tensor, width: int) -> Tensor:
    """A map, (1, A * width, H, W), as (P, width), P = H * W * A."""
    return values[0].permute(1, 2, 0).reshape(-1, width)


def level_priors(head: nn.Module, maps: Sequence[Tensor], **options: bool) -> list[Tensor]:
    """Anchors, (P, 4), or points, (P, 2), of each level, for maps of these sizes."""
    return head.prior_generator.grid_priors(
        [values.shape[-2:] for values in maps], dtype=maps[0].dtype, device='cpu', **options
    )


def _class_scores(head: nn.Module, raw: Tensor) -> Tensor:
    raw = rows_of(raw, head.cls_out_channels)
    # The background is the last class.
    return raw.sigmoid() if head.use_sigmoid_cls else raw.softmax(dim=-1)[:, :-1]


def _by_level(
    decode_level: Callable[..., Candidates],
    head: nn.Module,
    outputs: Sequence[Any],
    frame: Frame,
    cfg: ConfigDict,
) -> Candidates:
    scores = outputs[0]
    factors = outputs[2] if len(outputs) > 2 else [None] * len(scores)
    priors = level_priors(head, scores)
    return Candidates.join(
        [
            decode_level(head, level, *of_level, frame, cfg)
            for level, of_level in enumerate(zip(scores, outputs[1], factors, priors))
        ]
    )


def _level(
    head: nn.Module,
    level: int,
    raw_scores: Tensor,
    raw_boxes: Tensor,
    factor: Tensor | None,
    priors: Tensor,
    frame: Frame,
    cfg: ConfigDict,
) -> Candidates:
    """`BaseDenseHead`'s."""
    scores, labels, cells, above = best_candidates(
        _class_scores(head, raw_scores), cfg.get('score_thr', 0), cfg.nms_pre
    )
    raw = rows_of(raw_boxes, head.bbox_coder.encode_size)
    boxes = decode_boxes(head.bbox_coder, priors[cells], raw[cells], frame)
    if factor is not None:
        scores = scores * rows_of(factor, 1)[cells, 0].sigmoid()
    return Candidates(boxes, scores, labels).where(above)


def _gfl_level(
    head: nn.Module,
    level: int,
    raw_scores: Tensor,
    raw_boxes: Tensor,
    factor: None,
    priors: Tensor,
    frame: Frame,
    cfg: ConfigDict,
) -> Candidates:
    """`GFLHead`'s: distances are means of distributions."""
    scores, labels, cells, above = best_candidates(
        _class_scores(head, raw_scores), cfg.score_thr, cfg.nms_pre
    )
    raw = rows_of(raw_boxes, 4 * (head.reg_max + 1))[cells]
    distances = head.integral(raw) * head.prior_generator.strides[level][0]
    boxes = decode_boxes(head.bbox_coder, head.anchor_center(priors[cells]), distances, frame)
    return Candidates(boxes, scores, labels).where(above)


def _yolox(head: YOLOXHead, outputs: Sequence[Any], threshold: float) -> Candidates:
    """`YOLOXHead`'s: each cell has one class, and all above the threshold are candidates."""
    raw_scores, raw_boxes, raw_objects = outputs
    priors = torch.cat(level_priors(head, raw_scores, with_stride=True))
    scores = torch.cat([rows_of(values, head.cls_out_channels) for values in raw_scores]).sigmoid()
    objects = torch.cat([rows_of(values, 1) for values in raw_objects]).sigmoid()[:, 0]
    raw = torch.cat([rows_of(values, 4) for values in raw_boxes])
    best, labels = scores.max(dim=1)
    scores = best * objects
    boxes = decode_yolox(head, priors, raw)
    return Candidates(boxes, scores, labels).where(scores >= threshold)


def _yolo(head: AnchorHead, outputs: Sequence[Any], frame: Frame, cfg: ConfigDict) -> Candidates:
    """`AnchorHead`'s, of YOLOv5 and YOLOv7: the best of all levels together."""
    boxes, scores = [], []
    for level, (raw_scores, raw_boxes, raw_objects) in enumerate(zip(*outputs)):
        height, width = raw_objects.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        cells = torch.broadcast_tensors(
            torch.arange(head.num_anchors), rows[:, :, None], columns[:, :, None]
        )
        cells = [index.reshape(-1) for index in cells]
        boxes.append(head.decode(rows_of(raw_boxes, 4), level, *cells))
        objects = rows_of(raw_objects, 1).float().sigmoid()
        classes = rows_of(raw_scores, head.num_classes)
        scores.append(objects * classes.sigmoid() if head.num_classes > 1 else objects)
    best, labels, rows, above = best_candidates(torch.cat(scores), cfg.score_thr, cfg.nms_pre)
    corners = bbox_cxcywh_to_xyxy(torch.cat(boxes)[rows])
    # Inside the image without what the pipeline padded.
    height, width = frame.original * frame.scale.flip(0)
    return Candidates(clip(corners, height, width), best, labels).where(above)
