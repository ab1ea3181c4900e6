# A small Faster R-CNN for small images, trained from scratch: ResNet-18 of half the width, anchors of
# 16 to 128 pixels, few proposals.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48, num_outs=4),
    rpn_head=dict(
        in_channels=48,
        feat_channels=48,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, finest_scale=14, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=48, fc_out_channels=192, num_classes=10)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=48))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60)))
