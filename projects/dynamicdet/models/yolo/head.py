"""The anchor head of YOLOv5 and YOLOv7: boxes, objectness, classes.

Letters: N images, L levels, A anchors per level, C classes, H_l x W_l cells of a level.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import ConfigType, InstanceList, OptConfigType, OptInstanceList

from ...precision import KeepsTypeOfBuffers
from ..fusing import Fusible
from .assigner import candidate_cells

#: What each level's objectness counts, shallow to deep, by the number of levels.
_BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}


#: Of a level: class scores, box predictions and objectness, as `AnchorHead.forward` gives them.
LevelOutput = tuple[Tensor, Tensor, Tensor]


class Matches(NamedTuple):
    """Cells of one level that answer for an object: indices, (M,); boxes, (M, 4) as center and
    size; and labels, (M,)."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    boxes: Tensor
    labels: Tensor


class AnchorHead(KeepsTypeOfBuffers, Fusible, BaseDenseHead):
    """One convolution per level. Its channels are A times 4 for boxes, then A for objectness, then
    A times C for classes. Boxes are decoded in float32 whatever type the head is turned into.

    Args:
        num_classes (int): C.
        channels (Sequence[int]): Of the levels, stride 8 first.
        anchors (Sequence): (L, A, 2), width and height in pixels.
        loss_weights (dict): Of 'bbox', 'obj' and 'cls'.
        train_cfg (dict, optional): ``max_ratio`` of an object's sides to an anchor's; defaults to
            4.
        test_cfg (dict, optional): ``score_thr``, ``nms_pre``, ``nms`` and ``max_per_img``, as in
            mmdet.
        init_cfg (dict, optional): As in mmengine. Defaults to None.
    """

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        anchors: Sequence,
        loss_weights: dict,
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        init_cfg: OptConfigType = None,
    ) -> None:
        super().__init__(init_cfg)
        anchors = torch.tensor(anchors)
        if anchors.dim() != 3 or len(anchors) != len(channels):
            raise ValueError(
                f'anchors must be (levels, anchors, 2) with {len(channels)} levels; got '
                f'{tuple(anchors.shape)}'
            )
        self.num_classes = num_classes
        self.num_anchors = anchors.shape[1]
        self.strides = [8 * 2**level for level in range(len(channels))]
        self.loss_weights = dict(loss_weights)
        self.train_cfg, self.test_cfg = train_cfg or {}, test_cfg
        self.register_buffer('anchors', anchors.float(), persistent=False)
        self.convs = ModuleList(
            nn.Conv2d(count, self.num_anchors * (5 + num_classes), 1) for count in channels
        )

    def init_weights(self) -> None:
        """Begin with eight objects per image of 640 pixels and equal classes (RetinaNet, section
        3.3)."""
        super().init_weights()
        boxes, objects = 4 * self.num_anchors, 5 * self.num_anchors
        for layer, stride in zip(self.convs, self.strides):
            layer.bias.data[boxes:objects] += math.log(8 / (640 / stride) ** 2)
            layer.bias.data[objects:] += math.log(0.6 / (self.num_classes - 0.99))

    def fuse(self) -> None:
        """Called at the end of fusing, which a detector with this head allows; nothing is left to
        do."""

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Raw outputs.

        Args:
            maps (Sequence[Tensor]): (N, C_l, H_l, W_l), shallow to deep.

        Returns:
            tuple[list[Tensor]]: For each level class scores, (N, A * C, H_l, W_l), box predictions,
            (N, A * 4, H_l, W_l), and objectness, (N, A, H_l, W_l); all before the sigmoid.
        """
        outputs = [self._level(level, x) for level, x in enumerate(maps)]
        parts = [self.num_anchors * 4, self.num_anchors, self.num_anchors * self.num_classes]
        boxes, objects, classes = zip(*(output.split(parts, dim=1) for output in outputs))
        return list(classes), list(boxes), list(objects)

    def _level(self, level: int, x: Tensor) -> Tensor:
        return self.convs[level](x)

    def decode(
        self, raw: Tensor, level: int, anchor: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        """Raw box predictions of some cells, (K, 4), as center and size in pixels."""
        raw = raw.float().sigmoid()
        stride = self.strides[level]
        center = (2 * raw[:, :2] - 0.5 + torch.stack([column, row], dim=1)) * stride
        return torch.cat([center, (2 * raw[:, 2:]) ** 2 * self.anchors[level][anchor]], dim=1)

    def candidates(self, boxes: Tensor, level: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Anchors and cells of a level that may answer for boxes, (G, 4) as center and size in
        pixels: the function of that name."""
        return candidate_cells(
            boxes,
            self.anchors[level],
            self.strides[level],
            size,
            self.train_cfg.get('max_ratio', 4.0),
        )

    # Inference.

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        objectnesses: list[Tensor],
        batch_img_metas: list[dict] | None = None,
        cfg: ConfigType | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceList:
        """Detections of each image. A cell gives a box for every class whose score, class times
        objectness, is above ``score_thr``. Arguments and result as in mmdet."""
        cfg = self.test_cfg if cfg is None else cfg
        results = []
        for index, meta in enumerate(batch_img_metas):
            levels = [
                self._confident(level, *(part[index] for part in parts), cfg.score_thr)
                for level, parts in enumerate(zip(cls_scores, bbox_preds, objectnesses))
            ]
            boxes, scores = (torch.cat(parts) for parts in zip(*levels))
            scores, labels, keep, _ = filter_scores_and_topk(scores, cfg.score_thr, cfg.nms_pre)
            boxes = _clip(bbox_cxcywh_to_xyxy(boxes[keep]), meta)
            detections = InstanceData(bboxes=boxes, scores=scores, labels=labels)
            results.append(self._bbox_post_process(detections, cfg, rescale, with_nms, meta))
        return results

    def _confident(
        self, level: int, cls: Tensor, box: Tensor, objectness: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Boxes, (K, 4) as center and size, and scores, (K, C), of one image's cells whose
        objectness is above the threshold: a score cannot be above it. Only they are decoded."""
        objectness = objectness.float().sigmoid()
        at = (objectness > threshold).nonzero(as_tuple=True)
        scores = objectness[at][:, None]
        if self.num_classes > 1:
            scores = scores * self.at_cells(cls, at).float().sigmoid()
        return self.decode(self.at_cells(box, at), level, *at), scores

    def at_cells(self, outputs: Tensor, cells: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """What one image's map of a level, (A * K, H_l, W_l), has in some cells, (M, K).

        Args:
            outputs (Tensor): Such as its class scores.
            cells (tuple[Tensor]): Anchor, row and column, (M,) each.
        """
        anchor, row, column = cells
        return outputs.unflatten(0, (self.num_anchors, -1))[anchor, :, row, column]

    # Training.

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        objectnesses: list[Tensor],
        batch_gt_instances: InstanceList,
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: OptInstanceList = None,
    ) -> dict:
        """Losses (as YOLOv5 and YOLOv7 were published: ``box`` 1 - CIoU, ``obj`` binary
        cross-entropy with the CIoU as target, ``cls`` binary cross-entropy): means over a level's
        matches or cells, summed over levels.

        Scaled by 3 / L; ``obj`` by the image's area over 640 x 640 and a balance of levels; ``cls``
        by C / 80.
        """
        with torch.no_grad():
            levels = list(zip(cls_scores, bbox_preds, objectnesses))
            matches = self._match(levels, batch_gt_instances)
        boxes, objects, classes = [], [], []
        for level, match in enumerate(matches):
            at = (match.image, match.anchor, match.row, match.column)
            raw = _anchors_apart(bbox_preds[level], self.num_anchors)
            raw = raw[match.image, match.anchor, :, match.row, match.column]
            overlap = ciou(self.decode(raw, level, *at[1:]), match.boxes)
            boxes.append(_mean(1 - overlap, raw))
            logits = objectnesses[level].float()
            target = in_cells(overlap.detach().clamp(min=0), at, logits)
            objects.append(F.binary_cross_entropy_with_logits(logits, target))
            logits = _anchors_apart(cls_scores[level], self.num_anchors)
            logits = logits[match.image, match.anchor, :, match.row, match.column].float()
            target = F.one_hot(match.labels, self.num_classes).to(logits)
            classes.append(
                _mean(F.binary_cross_entropy_with_logits(logits, target, reduction='none'), logits)
            )
        levels = len(matches)
        size = [side * self.strides[0] for side in objectnesses[0].shape[-2:]]
        # Of the batch as it was delivered, where an exit sees it smaller.
        height, width = batch_img_metas[0].get('delivered_shape', size)
        area = height * width / 640**2
        balance = _BALANCE.get(levels, (1.0,) * levels)
        weights = {name: weight * 3 / levels for name, weight in self.loss_weights.items()}
        share = self.num_classes / 80 if self.num_classes > 1 else 0
        return dict(
            loss_bbox=weights['bbox'] * sum(boxes),
            loss_obj=weights['obj']
            * area
            * sum(b * objectness_loss for b, objectness_loss in zip(balance, objects)),
            loss_cls=weights['cls'] * share * sum(classes),
        )

    @abstractmethod
    def _match(self, levels: list[LevelOutput], instances: InstanceList) -> list[Matches]:
        """Cells of each level that answer for an object, over the batch. Without gradients."""


def _clip(boxes: Tensor, meta: dict) -> Tensor:
    """Boxes, (n, 4), inside the image: without the padding, where the original's size is known."""
    height, width = meta['img_shape'][:2]
    if 'ori_shape' in meta:
        scale = meta.get('scale_factor', (1.0, 1.0))
        height, width = meta['ori_shape'][0] * scale[1], meta['ori_shape'][1] * scale[0]
    boxes = boxes.clamp(min=0)
    # By numbers: a tensor of them would have to be copied to the device.
    return torch.stack(
        [
            boxes[:, 0].clamp(max=width),
            boxes[:, 1].clamp(max=height),
            boxes[:, 2].clamp(max=width),
            boxes[:, 3].clamp(max=height),
        ],
        dim=1,
    )


def in_cells(values: Tensor, at: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Zeros, but for values, (M,), in the cells that indices, (M,) for each dimension, name.

    A cell may be there several times, since objects lie close together: its last value counts, on
        any device. So
    it is in the published code on a CPU; on a GPU one counts there by chance.
    """
    filled = like.new_zeros(like.shape)
    cells = sum(index * step for index, step in zip(at, filled.stride()))
    last = cells.new_zeros(filled.numel()).scatter_reduce_(
        0, cells, torch.arange(len(cells), device=cells.device), 'amax'
    )
    # Whoever writes into a cell writes the same.
    filled.view(-1)[cells] = values[last[cells]]
    return filled


def _anchors_apart(maps: Tensor, anchors: int) -> Tensor:
    """(N, A * K, H, W) as (N, A, K, H, W), without a copy."""
    return maps.unflatten(1, (anchors, -1))


def _mean(values: Tensor, source: Tensor) -> Tensor:
    """Mean; where there is nothing, 0 with a gradient of 0 to the source."""
    return values.mean() if values.numel() else source.float().sum() * 0


def ciou(boxes: Tensor, others: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU (arXiv 1911.08287, equations 9 to 11) of pairs of boxes.

    mmdet's own leaves the aspect ratio out where boxes overlap less than half, which these networks
    do not.

    Args:
        boxes (Tensor): (M, 4), center x, center y, width, height.
        others (Tensor): (M, 4).
        eps (float): Keeps quotients finite. Defaults to 1e-7.

    Returns:
        Tensor: (M,), at most 1; may be negative.
    """
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    other_low, other_high = others[:, :2] - others[:, 2:] / 2, others[:, :2] + others[:, 2:] / 2
    inter = (
        (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(dim=1)
    )
    union = boxes[:, 2:].prod(dim=1) + others[:, 2:].prod(dim=1) - inter
    iou = inter / (union + eps)
    hull = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    distance = (boxes[:, :2] - others[:, :2]).square().sum(dim=1) / (hull.square().sum(dim=1) + eps)
    angle, other_angle = (torch.atan(b[:, 2] / (b[:, 3] + eps)) for b in (boxes, others))
    shape = 4 / math.pi**2 * (angle - other_angle).square()
    with torch.no_grad():
        weight = shape / (shape - iou + 1 + eps)
    return iou - distance - weight * shape
