# A small YOLOv7 for small images, trained from scratch: half of the depth, a quarter of the width,
# anchors of 6 to 96 pixels. Objectness and classes count ten and four times what was published: that is
# for longer runs on larger images.
model = dict(
    type='SingleStageDetector',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0., 0., 0.],
        std=[255., 255., 255.],
        bgr_to_rgb=True,
        pad_size_divisor=32),
    backbone=dict(type='YOLOV7Backbone', width=0.25, depth=0.5),
    neck=dict(type='YOLOV7PAFPN', width=0.25, depth=0.5),
    bbox_head=dict(
        type='YOLOV7Head',
        num_classes=10,
        loss_weights=dict(bbox=0.05, obj=7.0, cls=1.2),
        width=0.25,
        anchors=[[(6, 8), (10, 12), (14, 18)], [(18, 26), (26, 32), (34, 44)],
                 [(44, 56), (60, 72), (80, 96)]]),
    test_cfg=dict(
        score_thr=0.001,
        nms_pre=3000,
        nms=dict(type='nms', iou_threshold=0.65),
        max_per_img=100))
