# Step 1: the cascade of two Mask R-CNN R-50-FPN, 1x.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
