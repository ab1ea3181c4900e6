# A pair: YOLOX-nano at half the size on every image, YOLOv5n on those that need it. YOLOv5's checkpoint comes from
# tools/convert_checkpoint.py.
_base_ = './dy_yolox_nano_rtmdet_m.py'
from dynamicdet.configs import model_of
exits = [_base_.nano, model_of('./yolov5_n.py')]
model = dict(detector=exits, backbone=[one.backbone for one in exits], scales=(0.5, 1))
