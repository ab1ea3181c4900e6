# The pruned detector of faster_rcnn_digits_pruned.py with 16 values for the weights of each layer, tuned for two
# epochs.
_base_ = ['./faster_rcnn_digits.py', './_base_/weight_sharing.py']
load_from = 'work_dirs/faster_rcnn_digits_pruned/epoch_6.pth'
custom_hooks = _base_.custom_hooks + _base_.sharing_hooks
train_cfg = dict(max_epochs=2, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=2)
]
