# Step 2: the router of dy_atss.py.
_base_ = './dy_atss.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
