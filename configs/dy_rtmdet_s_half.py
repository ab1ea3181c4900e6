# Step 1: the cascade of two RTMDet-s, each with its own neck and head; exit 0 sees the image at half its
# size. What served best on the built-in data (docs/benchmarks.md).
_base_ = './dy_rtmdet_s.py'
model = dict(first_scale=0.5)
