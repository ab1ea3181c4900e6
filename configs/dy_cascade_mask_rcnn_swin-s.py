# Step 1: the cascade of two Cascade Mask R-CNN Swin-S-FPN: mmdet's detector with the backbone, the data
# and the schedule of its Mask R-CNN Swin-S, 3x, multi-scale, AdamW.
_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', './_base_/dynamic.py']
from mmengine.hub import get_config

detector = get_config('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py').model
detector.update(backbone=_base_.model.backbone, neck=_base_.model.neck)
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=detector,
    backbone=_base_.model.backbone,
    reuse_stages=0)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
