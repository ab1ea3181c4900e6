# Step 1: the cascade of two YOLOv7, each with its own neck and head.
_base_ = './yolov7.py'
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0)
visualizer = dict(type='DynamicVisualizer')
