# Step 2: the router of dy_cascade_mask_rcnn_swin-s.py.
_base_ = './dy_cascade_mask_rcnn_swin-s.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
