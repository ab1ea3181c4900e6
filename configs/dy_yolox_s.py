# Step 1: the cascade of two YOLOX-s, 300 epochs.
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0)
custom_hooks = [
    dict(type='BranchModeSwitchHook', num_last_epochs=15, priority=48)
] + _base_.custom_hooks[1:] + _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
