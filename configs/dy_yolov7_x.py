# Step 1: the cascade of two YOLOv7-X, each with its own neck and head.
_base_ = './yolov7_x.py'
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=_base_.model,
    # The released configuration has a slip, and its weights were trained with it: in front of the second backbone's
    # stage 2 the convolution of stride 2 reads the first backbone's map. None: as in the plain YOLOv7-X.
    backbone=dict(_base_.model.backbone, crossed_stage=2),
    shared=False,
    reuse_stages=0)
visualizer = dict(type='DynamicVisualizer')
