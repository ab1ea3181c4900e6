# Step 2: the router of dy_faster_rcnn_triple.py.
_base_ = ['./dy_faster_rcnn_triple.py', './_base_/router.py']
model = dict(train_router=True)
train_cfg = dict(_delete_=True, **_base_.router_step.train_cfg)
optim_wrapper = dict(_delete_=True, **_base_.router_step.optim_wrapper)
param_scheduler = _base_.router_step.param_scheduler
custom_hooks = _base_.custom_hooks + [
    dict(type='RouterHook', cascade='work_dirs/dy_faster_rcnn_triple')
]
