# Step 2: the router of dy_faster_rcnn_triple.py.
_base_ = './dy_faster_rcnn_router.py'
model = dict(backbones=3)
custom_hooks = _base_.custom_hooks[:-1] + [dict(type='RouterHook', cascade='work_dirs/dy_faster_rcnn_triple')]
