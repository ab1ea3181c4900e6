# Step 2: the router of dy_yolov7_w6.py.
_base_ = './dy_yolov7_w6.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
