# Step 1: the cascade of three Faster R-CNN R-50-FPN, with three exits.
_base_ = './dy_faster_rcnn.py'
model = dict(backbones=3)
