# Step 2: the router of dy_yolox_s_scales.py.
_base_ = ['./dy_yolox_s_scales.py', './_base_/yolo_router.py']
model = dict(train_router=True)
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=_base_.router_step.pipeline))
train_cfg = dict(_delete_=True, **_base_.router_step.train_cfg)
optim_wrapper = dict(_delete_=True, **_base_.router_step.optim_wrapper)
param_scheduler = _base_.router_step.param_scheduler
default_hooks = dict(checkpoint=dict(interval=1))
custom_hooks = _base_.dynamic_hooks + [
    dict(type='RouterHook', cascade='work_dirs/dy_yolox_s_scales')
]
