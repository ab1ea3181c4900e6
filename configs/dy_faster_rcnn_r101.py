# Step 1: the cascade of two Faster R-CNN R-101-FPN, 1x.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
