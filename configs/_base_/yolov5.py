# YOLOv5, release 6: detector, data, schedule; what differs from YOLOv7. Losses here are means over the batch,
# those of the published training sums over 64 images: lr and weight decay are the published 0.01 and 0.0005
# times and over 64. Images are padded at the right and at the bottom, not on all sides.
_base_ = './yolov7.py'
from dynamicdet.configs import by_type
arch = 's'
model = dict(
    backbone=dict(_delete_=True, type='YOLOV5Backbone', arch=arch),
    neck=dict(_delete_=True, type='YOLOV5PAFPN', arch=arch),
    bbox_head=dict(_delete_=True, type='YOLOV5Head', arch=arch, num_classes=80),
    test_cfg=dict(nms=dict(iou_threshold=0.6)))
train_pipeline = by_type(
    _base_.train_pipeline,
    RandomAffine=dict(max_translate_ratio=0.1, scaling_ratio_range=(0.5, 1.5)))
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(lr=0.01 * 64, weight_decay=0.0005 / 64))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(
        type='LinearLR',
        start_factor=0.99,
        end_factor=0.01,
        begin=3,
        end=300,
        by_epoch=True,
        convert_to_iter_based=True)
]
auto_scale_lr = dict(base_batch_size=64)
