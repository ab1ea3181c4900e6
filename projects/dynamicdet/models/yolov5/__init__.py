"""YOLOv5: architecture table, backbone, neck and head."""

from .architecture import SIZES, YOLOv5Architecture, YOLOv5Row, yolov5_architecture
from .backbone import YOLOV5Backbone
from .head import YOLOV5Head
from .neck import YOLOV5PAFPN

__all__ = [
    'YOLOv5Architecture',
    'YOLOv5Row',
    'SIZES',
    'YOLOV5Backbone',
    'YOLOV5Head',
    'YOLOV5PAFPN',
    'yolov5_architecture',
]
