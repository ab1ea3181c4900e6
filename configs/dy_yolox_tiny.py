# Step 1: the cascade of two YOLOX-tiny, 300 epochs.
_base_ = ['mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', './_base_/dynamic.py']
from dynamicdet.configs import by_type
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0)
custom_hooks = by_type(
    _base_.custom_hooks, YOLOXModeSwitchHook=dict(type='BranchModeSwitchHook')) + _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
