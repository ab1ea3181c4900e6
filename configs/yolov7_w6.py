# YOLOv7-W6, at 1280 pixels: the baseline of dy_yolov7_w6.py.
_base_ = './yolov7.py'
from dynamicdet.configs import by_type
img_scale = (1280, 1280)
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(arch='w6'),
    neck=dict(arch='w6'),
    bbox_head=dict(arch='w6'))
train_pipeline = by_type(
    _base_.train_pipeline,
    Mosaic=dict(img_scale=img_scale),
    RandomAffine=dict(border=(-640, -640)))
test_pipeline = by_type(
    _base_.test_pipeline, Resize=dict(scale=img_scale), Pad=dict(size=img_scale))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
