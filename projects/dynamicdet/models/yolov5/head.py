"""YOLOv5's head. Letters: L levels, A anchors per level, C classes."""

from collections.abc import Sequence

import torch

from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh, get_box_tensor
from mmdet.utils import InstanceList, OptConfigType

from ..yolo import AnchorHead, LevelOutput, Matches
from .architecture import yolov5_architecture

#: Of the published networks, width and height in pixels, three per level.
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


@MODELS.register_module()
class YOLOV5Head(AnchorHead):
    """An `AnchorHead` in which all anchors and cells that are near an object answer for it.

    Args:
        num_classes (int): C.
        arch (str): 'n', 's', 'm', 'l' or 'x'; sets the channels.
        width (float): Factor on the channels, as in backbone and neck. Defaults to 1.
        anchors (Sequence, optional): (3, A, 2), width and height in pixels. Defaults to the
            published ones.
        loss_weights (dict): Of 'bbox', 'obj' and 'cls'. Defaults to those with which n and s were
            published.
        train_cfg, test_cfg, init_cfg: As of `AnchorHead`.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = 's',
        width: float = 1.0,
        anchors: Sequence | None = None,
        loss_weights: dict = dict(bbox=0.05, obj=1.0, cls=0.5),
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        init_cfg: OptConfigType = None,
    ) -> None:
        table = yolov5_architecture(arch, width)
        channels, anchors = table.channels(*table.outputs), anchors or ANCHORS
        super().__init__(
            num_classes, channels, anchors, loss_weights, train_cfg, test_cfg, init_cfg
        )

    def _match(self, levels: list[LevelOutput], instances: InstanceList) -> list[Matches]:
        corners = [get_box_tensor(image_instances.bboxes).float() for image_instances in instances]
        boxes = bbox_xyxy_to_cxcywh(torch.cat(corners))
        each = [image_instances.labels for image_instances in instances]
        labels = torch.cat(each)
        image = torch.cat(
            [torch.full_like(image_labels, index) for index, image_labels in enumerate(each)]
        )
        matches = []
        for level, (_, _, objectness) in enumerate(levels):
            anchor, row, column, owner = self.candidates(boxes, level, objectness.shape[-2:])
            matches.append(Matches(image[owner], anchor, row, column, boxes[owner], labels[owner]))
        return matches
