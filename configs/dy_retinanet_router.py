# Step 2: the router of dy_retinanet.py.
_base_ = './dy_retinanet.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
