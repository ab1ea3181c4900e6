# The schedule of step 2, as released by the paper's authors (arXiv 2304.05552): AdamW, lr 1e-5
# constant after 1000 warm-up iterations, weight decay 0.005 on weights, 2 epochs, 64 images per
# update. Under one name, since mmengine lets no two bases set the same key.
router_step = dict(
    train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)
    ],
    optim_wrapper=dict(
        type='OptimWrapper',
        # 8 GPUs x 2 images x 4.
        accumulative_counts=4,
        optimizer=dict(type='AdamW', lr=1e-5, betas=(0.937, 0.999), weight_decay=0.005),
        # Heads such as RTMDet's hold a parameter more than once.
        paramwise_cfg=dict(bias_decay_mult=0.0, bypass_duplicate=True)))
