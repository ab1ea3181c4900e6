# Step 2: the router of dy_rtmdet_s_half.py.
_base_ = './dy_rtmdet_s_router.py'
model = dict(first_scale=0.5, objective='rank')
custom_hooks = _base_.custom_hooks[:-1] + [dict(type='RouterHook', cascade='work_dirs/dy_rtmdet_s_half')]
