# Step 2: the router of dy_rtmdet_s_half.py.
_base_ = './dy_rtmdet_s_half.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_, objective='rank'))
