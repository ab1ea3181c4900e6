# ImageNet VID in CocoVID format, for YOLOv5: 30 classes, 15 marked frames of each training video, and the
# validation's videos frame after frame.
_base_ = ['./yolov5.py', './dynamic.py']
data_root = 'data/ILSVRC/'
img_scale = (640, 640)  # width, height
video_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'video_id', 'frame_id',
              'video_length')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=img_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=img_scale, pad_val=dict(img=(114, 114, 114))),
    dict(type='PackDetInputs', meta_keys=(*video_keys, 'clip_step'))
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=img_scale, keep_ratio=True),
    dict(type='Pad', size=img_scale, pad_val=dict(img=(114, 114, 114))),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=video_keys)
]
train_dataloader = dict(
    _delete_=True,
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ImageNetVIDDataset',
        data_root=data_root,
        ann_file='annotations/imagenet_vid_train.json',
        data_prefix=dict(img='Data/VID/'),
        filter_cfg=dict(marked='is_vid_train_frame'),
        pipeline=train_pipeline))
# Clips instead, for what remembers: `train_dataloader = _base_.clips` in a child config.
clips = dict(sampler=dict(_delete_=True, type='ClipSampler', frames=4, gaps=(1, 1)))
val_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='VideoSampler'),
    batch_sampler=dict(type='StreamBatchSampler'),
    dataset=dict(
        type='ImageNetVIDDataset',
        data_root=data_root,
        ann_file='annotations/imagenet_vid_val.json',
        data_prefix=dict(img='Data/VID/'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = dict(**val_dataloader)
val_evaluator = dict(
    _delete_=True, type='ExitsMetric', ann_file=data_root + 'annotations/imagenet_vid_val.json')
test_evaluator = dict(**val_evaluator)
val_cfg = dict(type='AllExitsValLoop')
test_cfg = dict(type='AllExitsTestLoop')
