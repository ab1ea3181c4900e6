# Step 1: the cascade of two Mask R-CNN RegNetY-4GF-FPN, 1x. Step 2: --step router.
from detectron2 import model_zoo

from dynamicdet_detectron2 import make_dynamic

_zoo = model_zoo.get_config('COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py')
dataloader, optimizer, lr_multiplier, train = (
    _zoo[name] for name in ('dataloader', 'optimizer', 'lr_multiplier', 'train')
)
model = make_dynamic(_zoo.model)
train.output_dir = 'work_dirs/detectron2/dy_mask_rcnn_regnety_4gf_FPN'
