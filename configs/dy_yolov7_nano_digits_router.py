# Step 2: the router of dy_yolov7_nano_digits.py.
_base_ = ['./dy_yolov7_nano_digits.py', './_base_/digits_router.py']
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
