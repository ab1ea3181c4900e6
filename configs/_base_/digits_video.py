# The built-in videos: tools/make_digits_video.py makes them. Frames one by one, and clips of frames for
# training what remembers; schedules for two CPU cores are the child configs' own.
_base_ = 'digits.py'
data_root = 'data/digits_video/'
video_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'video_id', 'frame_id',
              'video_length')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale={{_base_.scale}}, keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=(*video_keys, 'clip_step'))
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={{_base_.scale}}, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=video_keys)
]
# Frames of all videos in random order.
train_dataloader = dict(
    batch_size=16,
    dataset=dict(type='VideoDataset', data_root=data_root, pipeline=train_pipeline))
# Four clips of four frames, 1 to 3 frames apart, instead: `train_dataloader = _base_.clips` in a child
# config.
clips = dict(
    batch_size=16,
    batch_sampler=None,
    sampler=dict(_delete_=True, type='ClipSampler', frames=4, gaps=(1, 3)))
# Frame after frame, eight videos side by side.
stream = dict(
    batch_size=8,
    sampler=dict(_delete_=True, type='VideoSampler'),
    batch_sampler=dict(type='StreamBatchSampler'),
    dataset=dict(type='VideoDataset', data_root=data_root, pipeline=test_pipeline))
val_dataloader = stream
test_dataloader = stream
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
