# Step 2 of the demo: the router of dy_faster_rcnn_digits.py.
_base_ = ['./dy_faster_rcnn_digits.py', './_base_/digits_router.py']
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
