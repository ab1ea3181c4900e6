"""The auxiliary head of a layer. Letters: N images, A anchors, C classes."""

from collections.abc import Sequence

from torch import Tensor

from mmdet.registry import MODELS
from mmdet.utils import OptConfigType

from ..models.yolo import AnchorHead, conv
from ..models.yolov5 import YOLOV5Head

#: Pixels per cell of the finest output: 80 x 80 cells at 640 (Gay 2022).
FINEST = 8


@MODELS.register_module()
class ExitHead(AnchorHead):
    """Detections from one layer's map, with all of the detector's anchors on it (Gay 2022): a 1x1
    convolution to a uniform number of channels, strided where the map is finer than 8 pixels per
    cell, then one to A * (5 + C).

    The first has a norm and SiLU, as all of YOLOv5's have; the seed's parameter counts, 80 to 128
    thousand for YOLOv5s and 80 classes, come out exactly that way. Losses and assignment are
    YOLOv5's.

    Args:
        num_classes (int): C.
        in_channels (int): Of the layer's map.
        stride (int): Pixels of the image per cell of that map.
        anchors (Sequence): (A, 2), width and height in pixels.
        channels (int): Between the convolutions. Defaults to 100.
        loss_weights (dict): Of 'bbox', 'obj' and 'cls'. Defaults to YOLOv5's.
        train_cfg, test_cfg, init_cfg: As of `AnchorHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stride: int,
        anchors: Sequence,
        channels: int = 100,
        loss_weights: dict = dict(bbox=0.05, obj=1.0, cls=0.5),
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        init_cfg: OptConfigType = None,
    ) -> None:
        super().__init__(
            num_classes, (channels,), [anchors], loss_weights, train_cfg, test_cfg, init_cfg
        )
        self.channels = channels
        self.strides = [max(stride, FINEST)]
        self.reduce = conv(in_channels, channels, 1, self.strides[0] // stride)

    # Which cells answer for which object does not depend on the number of levels.
    _match = YOLOV5Head._match

    def features(self, x: Tensor) -> Tensor:
        """What `forward`, ``loss`` and ``predict`` take, in a list of one: (N, channels, H', W') of
        the layer's map, (N, in_channels, H, W)."""
        return self.reduce(x)
