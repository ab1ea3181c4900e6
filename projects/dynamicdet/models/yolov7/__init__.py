from .architecture import ARCHITECTURES, Architecture, Elan, architecture
from .backbone import YOLOV7Backbone
from .blocks import RepConv
from .head import YOLOV7Head
from .neck import YOLOV7PAFPN

__all__ = [
    'ARCHITECTURES',
    'Architecture',
    'Elan',
    'RepConv',
    'YOLOV7Backbone',
    'YOLOV7Head',
    'YOLOV7PAFPN',
    'architecture',
]
