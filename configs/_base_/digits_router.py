# Step 2 on the built-in data: on the 600 images that step 1 does not see; with so few, at a higher learning
# rate than on COCO. dynamicdet.configs.router_step merges it over its own schedule.
router_step = dict(
    train_dataloader=dict(dataset=dict(indices=-600)),
    train_cfg=dict(max_epochs=4, val_interval=4),
    param_scheduler=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)],
    optim_wrapper=dict(optimizer=dict(lr=1e-4, betas=(0.9, 0.999))))
