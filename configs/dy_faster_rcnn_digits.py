# Step 1 of the demo: the cascade of two small Faster R-CNN, from scratch, on the built-in data set; exit
# 0 sees the image at half its size.
_base_ = './faster_rcnn_digits.py'
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    reuse_stages=0,
    first_scale=0.5)
# Half of the plain detector's epochs: enough to show what routing does.
train_cfg = dict(max_epochs=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=5)
]
visualizer = dict(type='DynamicVisualizer')
