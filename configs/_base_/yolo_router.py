# Step 2 of YOLOX and RTMDet: router.py's, for 8 GPUs x 8 images. The pipeline is YOLOX's without mosaic
# and mixup (RTMDet has one of its own); scale and translation as released by the paper's authors.
_base_ = './router.py'
router_step = dict(
    optim_wrapper=dict(accumulative_counts=1),
    pipeline=[
        dict(
            type='RandomAffine',
            max_rotate_degree=0,
            max_translate_ratio=0.2,
            scaling_ratio_range=(0.1, 1.9),
            max_shear_degree=0),
        dict(type='YOLOXHSVRandomAug'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='Resize', scale=(640, 640), keep_ratio=True),
        dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
        dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
        dict(type='PackDetInputs')
    ])
