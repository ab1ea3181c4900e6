# YOLOv5n with early exits, on ImageNet VID.
_base_ = './early_exit_yolov5_s.py'
model = dict(
    backbone=dict(arch='n'),
    detector=dict(backbone=dict(arch='n'), neck=dict(arch='n'), bbox_head=dict(arch='n')))
