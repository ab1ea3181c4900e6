# A small Faster R-CNN on the built-in data set, from scratch: the plain detector behind
# dy_faster_rcnn_digits.py. 600 of the 3,000 training images are kept for step 2: a router learns little
# from images that the detectors have memorized.
_base_ = ['./_base_/digits.py', './_base_/digits_faster_rcnn.py', './_base_/dynamic.py']
train_dataloader = dict(dataset=dict(indices=2400))
custom_hooks = _base_.dynamic_hooks
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10, val_interval=5)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.02),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=10)
]
