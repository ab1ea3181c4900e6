# Step 1: one YOLOX-s at two sizes, no second backbone.
_base_ = './dy_yolox_s.py'
model = dict(backbones=1, shared=True, first_scale=0.5)
