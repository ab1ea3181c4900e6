# Step 1: as dy_faster_rcnn_detectron2.py, on R-101.
_base_ = './dy_faster_rcnn_detectron2.py'
deeper = dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://detectron2/resnet101_caffe'))
model = dict(detector=dict(backbone=deeper), backbone=deeper)
