# Step 2: the router of dy_faster_rcnn_scales.py.
_base_ = './dy_faster_rcnn_router.py'
model = dict(backbones=1, reuse_stages=0, first_scale=0.5, objective='rank')
custom_hooks = _base_.custom_hooks[:-1] + [dict(type='RouterHook', cascade='work_dirs/dy_faster_rcnn_scales')]
