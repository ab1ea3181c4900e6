from .architecture import SIZES, Architecture, Row, architecture
from .backbone import YOLOV5Backbone
from .head import YOLOV5Head
from .neck import YOLOV5PAFPN

__all__ = [
    'Architecture',
    'Row',
    'SIZES',
    'YOLOV5Backbone',
    'YOLOV5Head',
    'YOLOV5PAFPN',
    'architecture',
]
