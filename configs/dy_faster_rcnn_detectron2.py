# Step 1: the cascade of two Faster R-CNN R-50-FPN, 1x, as Detectron2 builds them: BGR images, stride in
# the first 1x1 convolution. Takes its model zoo's weights: docs/convert.md.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py', './_base_/dynamic.py']
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone)
custom_hooks = _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
