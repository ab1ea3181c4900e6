# The detector of yolov5_digits_video.py with six early exits, all trained together, from weights without them.
_base_ = './yolov5_digits_video.py'
model = dict(
    _delete_=True,
    type='EarlyExitDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    heads=dict(type='ExitHead', layers=[2, 4, 6, 9, 11, 13], channels=32))
custom_hooks = _base_.custom_hooks + [dict(type='ExitCurveHook')]
val_cfg = dict(type='AllExitsValLoop')
test_cfg = dict(type='AllExitsTestLoop')
val_evaluator = dict(
    _delete_=True, type='ExitsMetric', ann_file=_base_.data_root + 'annotations/instances_val.json')
test_evaluator = dict(
    _delete_=True, type='ExitsMetric', ann_file=_base_.data_root + 'annotations/instances_test.json')
