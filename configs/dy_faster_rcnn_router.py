# Step 2: the router of dy_faster_rcnn.py.
_base_ = './dy_faster_rcnn.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
