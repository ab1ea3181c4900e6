# YOLOv7-X: the baseline of dy_yolov7_x.py.
_base_ = './yolov7.py'
model = dict(backbone=dict(arch='x'), neck=dict(arch='x'), bbox_head=dict(arch='x'))
