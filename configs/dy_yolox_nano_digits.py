# Step 1 of a YOLOX-nano on the built-in data set, from scratch, without mosaic; exit 0 sees the image at
# half its size.
_base_ = './yolox_nano_digits.py'
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    backbone=_base_.model.backbone,
    shared=False,
    reuse_stages=0,
    first_scale=0.5)
visualizer = dict(type='DynamicVisualizer')
