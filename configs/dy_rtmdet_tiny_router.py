# Step 2: the router of dy_rtmdet_tiny.py.
_base_ = './dy_rtmdet_tiny.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
