# A YOLOX-nano on the built-in data set, from scratch, without mosaic: the plain detector behind
# dy_yolox_nano_digits.py. 600 of the 3,000 training images are kept for step 2, as in
# faster_rcnn_digits.py.
_base_ = ['./_base_/digits.py', './_base_/digits_yolox.py', './_base_/dynamic.py']
train_dataloader = dict(dataset=dict(indices=2400))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49)
] + _base_.dynamic_hooks
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=4)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=12)
]
