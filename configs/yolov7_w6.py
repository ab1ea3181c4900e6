# YOLOv7-W6, at 1280 pixels: the baseline of dy_yolov7_w6.py.
_base_ = './yolov7.py'
img_scale = (1280, 1280)
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(arch='w6'),
    neck=dict(arch='w6'),
    bbox_head=dict(arch='w6'))
train_pipeline = _base_.train_pipeline
train_pipeline[0].update(img_scale=img_scale)
train_pipeline[1].update(border=(-640, -640))
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=img_scale)
test_pipeline[2].update(size=img_scale)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
