# YOLOv5 with a head on each of its 18 layers, on ImageNet VID: all trained together, from weights of COCO at
# a third of their rate. Name them: --cfg-options load_from=...
_base_ = './imagenet_vid.py'
_base_.model.bbox_head.update(num_classes=30)
model = dict(
    _delete_=True,
    type='EarlyExitDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    heads=dict(type='ExitHead', channels=100))
train_cfg = dict(max_epochs=30, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=0.003 * 64))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='LinearLR',
        start_factor=1.0,
        end_factor=0.01,
        begin=1,
        end=30,
        by_epoch=True,
        convert_to_iter_based=True)
]
custom_hooks = _base_.ema_hooks + _base_.dynamic_hooks + [dict(type='ExitCurveHook')]
