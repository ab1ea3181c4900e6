# A YOLOv5n for small images, trained from scratch: anchors of 6 to 96 pixels, of which those answer for an
# object that are at most twice as large or small, since they lie closer together than the published ones.
# Objectness and classes count more than published, as in digits_yolov7.py.
model = dict(
    type='SingleStageDetector',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0., 0., 0.],
        std=[255., 255., 255.],
        bgr_to_rgb=True,
        pad_size_divisor=32),
    backbone=dict(type='YOLOV5Backbone', arch='n'),
    neck=dict(type='YOLOV5PAFPN', arch='n'),
    bbox_head=dict(
        type='YOLOV5Head',
        arch='n',
        num_classes=10,
        loss_weights=dict(bbox=0.05, obj=7.0, cls=2.4),
        anchors=[[(6, 8), (10, 12), (14, 18)], [(18, 26), (26, 32), (34, 44)],
                 [(44, 56), (60, 72), (80, 96)]]),
    train_cfg=dict(max_ratio=2.0),
    test_cfg=dict(
        score_thr=0.01,
        nms_pre=1000,
        nms=dict(type='nms', iou_threshold=0.6),
        max_per_img=100))
