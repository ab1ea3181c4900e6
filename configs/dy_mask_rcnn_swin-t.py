# Step 1: the cascade of two Mask R-CNN Swin-T-FPN, 3x, multi-scale, AdamW.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    reuse_stages=0)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
