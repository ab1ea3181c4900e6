# YOLOv5l.
_base_ = './yolov5_m.py'
model = dict(backbone=dict(arch='l'), neck=dict(arch='l'), bbox_head=dict(arch='l'))
