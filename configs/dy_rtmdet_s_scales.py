# Step 1: one RTMDet-s at two sizes, no second backbone.
_base_ = './dy_rtmdet_s.py'
model = dict(backbones=1, shared=True, first_scale=0.5)
