# Step 2: the router of dy_fcos.py.
_base_ = './dy_fcos.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
