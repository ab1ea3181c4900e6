# Step 2: the router of dy_yolox_nano_digits.py, on the 600 images that step 1 did not
# see; with so few, at a higher learning rate than on COCO.
_base_ = ['./dy_yolox_nano_digits.py', './_base_/router.py']
model = dict(train_router=True)
train_dataloader = dict(dataset=dict(indices=-600))
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=4, val_interval=4)
optim_wrapper = dict(_delete_=True, **_base_.router_step.optim_wrapper)
optim_wrapper.update(accumulative_counts=1, optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.005))
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)]
custom_hooks = _base_.dynamic_hooks + [
    dict(type='RouterHook', cascade='work_dirs/dy_yolox_nano_digits')
]
