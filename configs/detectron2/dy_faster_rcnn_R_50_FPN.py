# Step 1: the cascade of two Faster R-CNN R-50-FPN, 1x. Step 2: --step router.
from detectron2 import model_zoo

from dynamicdet_detectron2 import make_dynamic

_zoo = model_zoo.get_config('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py')
dataloader, optimizer, lr_multiplier, train = (
    _zoo[name] for name in ('dataloader', 'optimizer', 'lr_multiplier', 'train')
)
model = make_dynamic(_zoo.model)
train.output_dir = 'work_dirs/detectron2/dy_faster_rcnn_R_50_FPN'
# The zoo has Mask R-CNN alone in this form.
for _part in ('mask_in_features', 'mask_pooler', 'mask_head'):
    model.detector.stock.roi_heads.pop(_part)
dataloader.train.mapper.use_instance_mask = False
