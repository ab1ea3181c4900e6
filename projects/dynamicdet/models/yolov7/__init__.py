"""YOLOv7: architecture table, backbone, neck and head."""

from .architecture import ARCHITECTURES, Elan, YOLOv7Architecture, yolov7_architecture
from .backbone import YOLOV7Backbone
from .blocks import RepConv
from .head import YOLOV7Head
from .neck import YOLOV7PAFPN

__all__ = [
    'ARCHITECTURES',
    'YOLOv7Architecture',
    'Elan',
    'RepConv',
    'YOLOV7Backbone',
    'YOLOV7Head',
    'YOLOV7PAFPN',
    'yolov7_architecture',
]
