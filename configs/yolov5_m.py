# YOLOv5m. From this size on, the published training weighs its losses as YOLOv7's does and scales images
# more; its MixUp and pasted objects, for a tenth of the images, are left out.
_base_ = './yolov5_s.py'
model = dict(
    backbone=dict(arch='m'),
    neck=dict(arch='m'),
    bbox_head=dict(arch='m', loss_weights=dict(bbox=0.05, obj=0.7, cls=0.3)))
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scaling_ratio_range=(0.1, 1.9))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end_factor=0.1)
