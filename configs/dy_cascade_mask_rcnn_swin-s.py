# Step 1: the cascade of two Cascade Mask R-CNN Swin-S-FPN: mmdet's detector with the backbone, the data
# and the schedule of its Mask R-CNN Swin-S, 3x, multi-scale, AdamW, and the box heads of Swin's and
# CBNetV2's authors.
_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', './_base_/dynamic.py']
from mmengine.hub import get_config

detector = get_config('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py').model
detector.update(backbone=_base_.model.backbone, neck=_base_.model.neck)
four_convs = dict(
    type='ConvFCBBoxHead',
    num_shared_convs=4,
    num_shared_fcs=1,
    conv_out_channels=256,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type='BN'),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
detector.roi_head.bbox_head = [dict(head, **four_convs) for head in detector.roi_head.bbox_head]
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=detector,
    backbone=_base_.model.backbone,
    reuse_stages=0)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
