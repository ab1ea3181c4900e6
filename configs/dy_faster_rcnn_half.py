# Step 1: the cascade of two Faster R-CNN R-50-FPN, each with its own neck and heads; exit 0 sees the image at half its
# size. What served best on the built-in data (docs/benchmarks.md).
_base_ = './dy_faster_rcnn.py'
model = dict(shared=False, reuse_stages=0, first_scale=0.5)
