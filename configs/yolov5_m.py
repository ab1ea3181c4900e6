# YOLOv5m. From this size on, the published training weighs its losses as YOLOv7's does and scales images
# more; its MixUp and pasted objects, for a tenth of the images, are left out.
_base_ = './yolov5_s.py'
from dynamicdet.configs import by_type
model = dict(
    backbone=dict(arch='m'),
    neck=dict(arch='m'),
    bbox_head=dict(arch='m', loss_weights=dict(bbox=0.05, obj=0.7, cls=0.3)))
train_pipeline = by_type(
    _base_.train_pipeline, RandomAffine=dict(scaling_ratio_range=(0.1, 1.9)))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(
        type='LinearLR',
        start_factor=0.99,
        end_factor=0.1,
        begin=3,
        end=300,
        by_epoch=True,
        convert_to_iter_based=True)
]
