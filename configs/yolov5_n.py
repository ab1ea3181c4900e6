# YOLOv5n.
_base_ = './yolov5_s.py'
model = dict(backbone=dict(arch='n'), neck=dict(arch='n'), bbox_head=dict(arch='n'))
