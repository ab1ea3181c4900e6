# Then all of early_exit_yolov5_s_propagation.py together, at a tenth of the rate.
_base_ = './early_exit_yolov5_s_propagation.py'
model = dict(mode='joint')
load_from = 'work_dirs/early_exit_yolov5_s_propagation/epoch_3.pth'
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
