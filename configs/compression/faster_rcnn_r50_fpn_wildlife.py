# Muhawenayo's detector of 13 kinds of animals: Detectron2's Faster R-CNN R-50 FPN 3x (docs/compression.md says
# how to get it), tuned on a folder of one's own, of which --cfg-options data_root=FOLDER is all that it needs,
# while 30 % of backbone and neck are pruned.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py', '../_base_/dynamic.py', '../_base_/pruning.py']
data_root = 'data/wildlife/'
metainfo = dict(classes=('giraffe', 'person', 'zebra', 'elephant', 'impala', 'monkey', 'lion', 'leopard',
                         'crocodile', 'buffalo', 'hyena', 'bird', 'gorilla'))
load_from = 'faster_rcnn_r50_detectron2.pth'
model = dict(backbone=dict(init_cfg=None), roi_head=dict(bbox_head=dict(num_classes=13)))
# 80 % and 20 % of the images, which are all in one folder.
shared = dict(data_root=data_root, metainfo=metainfo, data_prefix=dict(img='images/'))
train_dataloader = dict(dataset=dict(ann_file='annotations/instances_train.json', **shared))
val_dataloader = dict(dataset=dict(ann_file='annotations/instances_val.json', **shared))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
# For the batch of 2; 12 epochs, the first of which prune.
optim_wrapper = dict(optimizer=dict(lr=0.0025))
custom_hooks = _base_.dynamic_hooks + _base_.pruning_hooks
