# Step 2: the router of dy_mask_rcnn_detectron2.py.
_base_ = './dy_mask_rcnn_detectron2.py'
from dynamicdet.configs import router_step
globals().update(router_step(_base_))
