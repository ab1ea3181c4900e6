# YOLOv5x.
_base_ = './yolov5_m.py'
model = dict(backbone=dict(arch='x'), neck=dict(arch='x'), bbox_head=dict(arch='x'))
