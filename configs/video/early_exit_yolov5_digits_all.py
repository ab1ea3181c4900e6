# Then all of early_exit_yolov5_digits_propagation.py together, at a tenth of the first rate. Norms train too: two
# clips at a time.
_base_ = './early_exit_yolov5_digits_propagation.py'
model = dict(mode='joint')
train_dataloader = dict(sampler=dict(frames=8))
load_from = 'work_dirs/early_exit_yolov5_digits_propagation/epoch_3.pth'
optim_wrapper = dict(optimizer=dict(lr=3e-4))
