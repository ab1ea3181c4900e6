# Step 1: one Faster R-CNN R-50-FPN at two sizes, no second backbone: the cheapest way to make a published
# checkpoint dynamic.
_base_ = './dy_faster_rcnn.py'
model = dict(backbones=1, reuse_stages=0, first_scale=0.5)
