# The plain detector behind early_exit_yolov5_digits.py: yolov5_digits.py, tuned on the frames of the built-in
# videos.
_base_ = ['../_base_/digits_video.py', '../_base_/digits_yolov5.py', '../_base_/dynamic.py']
ema_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49)
]
custom_hooks = ema_hooks + _base_.dynamic_hooks
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=3)
]
load_from = 'work_dirs/yolov5_digits/epoch_16.pth'
