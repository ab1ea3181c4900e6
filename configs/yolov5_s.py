# YOLOv5s.
_base_ = ['./_base_/yolov5.py', './_base_/dynamic.py']
custom_hooks = _base_.ema_hooks + _base_.dynamic_hooks
