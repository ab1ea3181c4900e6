# Step 2: the router of dy_yolox_l.py.
_base_ = './dy_yolox_l.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
