"""YOLOv7's head: anchors, objectness, implicit knowledge.

Letters: L levels, A anchors per level, C classes.
"""

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh, get_box_tensor
from mmdet.utils import InstanceList, OptConfigType

from ..yolo import AnchorHead, LevelOutput, Matches
from .architecture import yolov7_architecture
from .assigner import sim_ota

#: Anchors of the published networks, width and height in pixels, three per level.
ANCHORS = dict(
    p5=(
        ((12, 16), (19, 36), (40, 28)),
        ((36, 75), (76, 55), (72, 146)),
        ((142, 110), (192, 243), (459, 401)),
    ),
    p6=(
        ((19, 27), (44, 40), (38, 94)),
        ((96, 68), (86, 152), (180, 137)),
        ((140, 301), (303, 264), (238, 542)),
        ((436, 615), (739, 380), (925, 792)),
    ),
)


@MODELS.register_module()
class YOLOV7Head(AnchorHead):
    """An `AnchorHead` between what is added to its inputs and what its outputs are multiplied with
    (implicit knowledge, arXiv 2105.04206).

    Args:
        num_classes (int): C.
        arch (str): 'v7', 'x' or 'w6'; sets channels and levels.
        width (float): Factor on the channels, as in backbone and neck. Defaults to 1.
        anchors (Sequence, optional): (L, A, 2), width and height in pixels. Defaults to the
            published ones.
        loss_weights (dict): Of 'bbox', 'obj' and 'cls'. Defaults to the published ones.
        train_cfg, test_cfg, init_cfg: As of `AnchorHead`.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = 'v7',
        width: float = 1.0,
        anchors: Sequence | None = None,
        loss_weights: dict = dict(bbox=0.05, obj=0.7, cls=0.3),
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        init_cfg: OptConfigType = None,
    ) -> None:
        channels = yolov7_architecture(arch, width).outputs
        anchors = anchors or ANCHORS['p5' if len(channels) == 3 else 'p6']
        super().__init__(
            num_classes, channels, anchors, loss_weights, train_cfg, test_cfg, init_cfg
        )
        wide = self.num_anchors * (5 + num_classes)
        self.added = nn.ParameterList(0.02 * torch.randn(1, count, 1, 1) for count in channels)
        self.multiplied = nn.ParameterList(1 + 0.02 * torch.randn(1, wide, 1, 1) for _ in channels)
        self.fused = False

    def fuse(self) -> None:
        """Put the implicit knowledge into the convolutions, for inference."""
        for layer, added, multiplied in zip(self.convs, self.added, self.multiplied):
            if not self.fused:
                layer.bias.data += layer.weight.data.flatten(1) @ added.data.flatten()
                layer.bias.data *= multiplied.data.flatten()
                layer.weight.data *= multiplied.data.view(-1, 1, 1, 1)
        self.fused = True

    def _level(self, level: int, x: Tensor) -> Tensor:
        if self.fused:
            return self.convs[level](x)
        return self.convs[level](x + self.added[level]) * self.multiplied[level]

    def _match(self, levels: list[LevelOutput], instances: InstanceList) -> list[Matches]:
        images = [
            self._match_image(
                index, [[part[index] for part in parts] for parts in levels], image_instances
            )
            for index, image_instances in enumerate(instances)
        ]
        return [Matches(*map(torch.cat, zip(*of_level))) for of_level in zip(*images)]

    def _match_image(
        self, index: int, outputs: list[list[Tensor]], instances: InstanceData
    ) -> list[Matches]:
        corners = get_box_tensor(instances.bboxes).float()
        boxes = bbox_xyxy_to_cxcywh(corners)
        cells, predicted, probabilities = [], [], []
        for level, (cls, raw, objectness) in enumerate(outputs):
            *at, _ = self.candidates(boxes, level, objectness.shape[-2:])
            cells.append(torch.stack([torch.full_like(at[0], level), *at]))
            decoded = self.decode(self.at_cells(raw, at), level, *at)
            predicted.append(bbox_cxcywh_to_xyxy(decoded))
            probabilities.append(
                self.at_cells(cls, at).float().sigmoid()
                * objectness[tuple(at)].float().sigmoid()[:, None]
            )
        cells = torch.cat(cells, dim=1)
        taken = owner = cells.new_zeros(0)
        if cells.shape[1]:
            taken, owner = sim_ota(
                corners, instances.labels, torch.cat(predicted), torch.cat(probabilities)
            )
        # Level by level, as candidates are.
        level, anchor, row, column = cells[:, taken]
        counts = (
            (level == torch.arange(len(outputs), device=level.device)[:, None]).sum(dim=1).tolist()
        )
        image, labels = torch.full_like(anchor, index), instances.labels[owner]
        whole = Matches(image, anchor, row, column, boxes[owner], labels)
        return [Matches(*fields) for fields in zip(*(tensor.split(counts) for tensor in whole))]
