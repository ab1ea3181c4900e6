# Step 1: as dy_faster_rcnn_detectron2.py, on X-101-32x8d, which has its stride in the 3x3 convolution
# and sees images over a standard deviation.
_base_ = './dy_faster_rcnn_detectron2.py'
wider = dict(
    type='ResNeXt',
    depth=101,
    groups=32,
    base_width=8,
    style='pytorch',
    init_cfg=dict(checkpoint='open-mmlab://detectron2/resnext101_32x8d'))
model = dict(
    detector=dict(backbone=wider, data_preprocessor=dict(std=[57.375, 57.12, 58.395])),
    backbone=wider)
