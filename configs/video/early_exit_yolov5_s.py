# YOLOv5s with early exits, on ImageNet VID.
_base_ = '../_base_/early_exit_yolov5.py'
