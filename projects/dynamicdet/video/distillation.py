"""The detector's own output as a second teacher of the auxiliary heads.

Letters: N images, G boxes that the detector is sure of, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.ops import nms
from torch import Tensor

from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

from ..models.yolo import AnchorHead, ciou


class Distillation(NamedTuple):
    """How much and from what is learned.

    Attributes:
        weight (float): Of the losses, beside those of the annotations. Defaults to 1.
        min_objectness (float): Below it a box teaches nothing. Defaults to 0.1.
        nms_iou (float): Of boxes that overlap more, the surest teaches. Defaults to 0.65.
        max_boxes (int): Per image, the surest. Defaults to 100.
    """

    weight: float = 1.0
    min_objectness: float = 0.1
    nms_iou: float = 0.65
    max_boxes: int = 100


class Lesson(NamedTuple):
    """What the detector says of a batch: of which image, (G,); boxes, (G, 4) as center and size in
    pixels; objectness, (G,), and class probabilities, (G, C), in [0, 1]."""

    image: Tensor
    boxes: Tensor
    objectness: Tensor
    classes: Tensor


@torch.no_grad()
def make_lesson(head: AnchorHead, maps: Sequence[Tensor], settings: Distillation) -> Lesson:
    """What a detector's head finds in its maps, each object once.

    Args:
        head (AnchorHead): The detector's.
        maps (Sequence[Tensor]): That it is given, (N, C_l, H_l, W_l).
        settings (Distillation): How.
    """
    parts = [_sure(head, level, settings, *raw) for level, raw in enumerate(zip(*head(maps)))]
    every = Lesson(*map(torch.cat, zip(*parts)))
    kept = []
    for image in range(len(maps[0])):
        rows = (every.image == image).nonzero().squeeze(1)
        sure = every.objectness[rows] * every.classes[rows].amax(dim=1)
        if len(rows):
            _, taken = nms(bbox_cxcywh_to_xyxy(every.boxes[rows]), sure, settings.nms_iou)
            kept.append(rows[taken[: settings.max_boxes]])
    kept = torch.cat(kept) if kept else every.image[:0]
    return Lesson(*(values[kept] for values in every))


def _sure(
    head: AnchorHead,
    level: int,
    settings: Distillation,
    classes: Tensor,
    boxes: Tensor,
    objects: Tensor,
) -> Lesson:
    """The cells of a level that are sure of an object."""
    objects = objects.float().sigmoid()
    image, *cell = (objects > settings.min_objectness).nonzero(as_tuple=True)
    anchor, row, column = cell
    raw, logits = (
        maps.unflatten(1, (head.num_anchors, -1))[image, anchor, :, row, column]
        for maps in (boxes, classes)
    )
    # As in its scores, a single class is left to objectness.
    sure = (
        logits.float().sigmoid()
        if head.num_classes > 1
        else torch.ones_like(logits, dtype=torch.float32)
    )
    return Lesson(image, head.decode(raw, level, *cell), objects[image, anchor, row, column], sure)


def distillation_losses(
    head: AnchorHead, raw: Sequence[Sequence[Tensor]], lesson: Lesson, settings: Distillation
) -> dict[str, Tensor]:
    """Objectness-scaled distillation (Mehta and Ozturk 2018, arXiv 1805.06361, section 3.2): with
    the teacher's boxes b, objectness o and class probabilities p in place of annotations

        obj: f_obj(o, own objectness)    box: o * f_box(b, own box)    cls: o * f_cls(p, own
            classes)

    where each f is the head's own loss, so that what the teacher is not sure of counts little. The
    paper's teacher has the student's cells, and non-maximum suppression over cells. Here layers
    have other cells than the detector: its boxes pass through ordinary suppression and are then
        assigned as annotations are.

    Args:
        head (AnchorHead): Of one level: an exit's.
        raw (Sequence): Its output: lists of one of class scores, boxes and objectness.
        lesson (Lesson): From `make_lesson`.
        settings (Distillation): How.

    Returns:
        dict: ``loss_distill_bbox``, ``loss_distill_obj`` and ``loss_distill_cls``.
    """
    (classes,), (boxes,), (objects,) = raw
    *cell, owner = head.candidates(lesson.boxes, 0, objects.shape[-2:])
    at = (lesson.image[owner], *cell)
    box_preds, logits = (
        maps.unflatten(1, (head.num_anchors, -1))[at[0], at[1], :, at[2], at[3]].float()
        for maps in (boxes, classes)
    )
    sure = lesson.objectness[owner]
    apart = 1 - ciou(head.decode(box_preds, 0, *cell), lesson.boxes[owner])
    wrong = F.binary_cross_entropy_with_logits(
        logits, lesson.classes[owner], reduction='none'
    ).mean(dim=1)
    target = torch.zeros_like(objects, dtype=torch.float32)
    # Of several objects at a cell, the surest.
    flat = (
        at[0] * objects[0].numel() + (at[1] * objects.shape[2] + at[2]) * objects.shape[3] + at[3]
    )
    target.view(-1).scatter_reduce_(0, flat, sure, 'amax')
    area = objects.shape[2] * objects.shape[3] * head.strides[0] ** 2 / 640**2
    share = head.num_classes / 80 if head.num_classes > 1 else 0
    # As `AnchorHead` weighs its losses on a single level.
    weights = {name: 3 * settings.weight * weight for name, weight in head.loss_weights.items()}
    count = max(1, len(sure))
    return dict(
        loss_distill_bbox=weights['bbox'] * (sure * apart).sum() / count,
        loss_distill_obj=weights['obj']
        * area
        * F.binary_cross_entropy_with_logits(objects.float(), target),
        loss_distill_cls=weights['cls'] * share * (sure * wrong).sum() / count,
    )
