# Step 2: the router of dy_yolox_s_scales.py.
_base_ = './dy_yolox_s_scales.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_, objective='rank'))
