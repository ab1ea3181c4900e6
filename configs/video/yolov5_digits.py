# A YOLOv5n on the built-in pictures, from scratch: what the detectors of the built-in videos start from.
_base_ = ['../_base_/digits.py', '../_base_/digits_yolov5.py', '../_base_/dynamic.py']
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49)
] + _base_.dynamic_hooks
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=16, val_interval=4)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=16)
]
