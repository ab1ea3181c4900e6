# Step 1: the cascade of two DINO R-50, 4 scales, 12 epochs.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
