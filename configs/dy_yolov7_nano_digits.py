# Step 1 of a small YOLOv7 on the built-in data set, from scratch, without mosaic; exit 0 sees the image
# at half its size. 600 of the 3,000 training images are kept for step 2, as in dy_faster_rcnn_digits.py.
_base_ = ['./_base_/digits.py', './_base_/digits_yolov7.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0,
    first_scale=0.5)
train_dataloader = dict(dataset=dict(indices=2400))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49)
] + _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=4)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bias_lr_mult=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=12)
]
