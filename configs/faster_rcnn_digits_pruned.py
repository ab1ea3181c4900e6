# The detector of faster_rcnn_digits.py with half of its weights pruned: the last checkpoint of that run is
# tuned on for six epochs, the first three of which prune.
_base_ = ['./faster_rcnn_digits.py', './_base_/pruning.py']
from dynamicdet.configs import by_type
load_from = 'work_dirs/faster_rcnn_digits/epoch_10.pth'
custom_hooks = _base_.custom_hooks + by_type(
    _base_.pruning_hooks,
    PruningHook=dict(blocks=[
        dict(name='backbone', modules=['backbone', 'neck'], target=0.5),
        dict(name='heads', modules=['rpn_head', 'roi_head'], target=0.5)
    ]))
train_cfg = dict(max_epochs=6, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=6)
]
