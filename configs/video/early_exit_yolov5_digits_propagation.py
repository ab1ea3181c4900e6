# Features of the frame before for the exits of early_exit_yolov5_digits.py: trained alone, on clips so long that
# what is remembered over a whole video has been met.
_base_ = './early_exit_yolov5_digits.py'
model = dict(
    mode='propagation',
    propagation=dict(type='Propagation', size=8, positional=True, gaps=8, truncate=4),
    cut=0.2)
train_dataloader = _base_.clips
train_dataloader['sampler']['frames'] = 16
load_from = 'work_dirs/early_exit_yolov5_digits/epoch_3.pth'
train_cfg = dict(max_epochs=3, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=3)
]
