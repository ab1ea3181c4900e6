# YOLOv7 as it was published: the baseline of dy_yolov7.py.
_base_ = ['./_base_/yolov7.py', './_base_/dynamic.py']
custom_hooks = _base_.ema_hooks + _base_.dynamic_hooks
