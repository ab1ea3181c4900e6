# Step 2: the router of dy_gfl.py.
_base_ = './dy_gfl.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
