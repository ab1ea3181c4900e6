# Step 1: the cascade of two FCOS R-50-FPN (caffe), 1x.
_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
