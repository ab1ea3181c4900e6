# Step 1: the cascade of two RTMDet-x, 300 epochs.
_base_ = ['mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0)
custom_hooks = _base_.custom_hooks + _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
