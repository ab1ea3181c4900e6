# Step 2: the router of dy_dino_r50.py.
_base_ = './dy_dino_r50.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
