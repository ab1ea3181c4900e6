# Features of the frame before for the heads of early_exit_yolov5_s.py: trained alone, on clips.
_base_ = './early_exit_yolov5_s.py'
model = dict(mode='propagation', propagation=dict(type='Propagation', size=20, truncate=4))
train_dataloader = _base_.clips
load_from = 'work_dirs/early_exit_yolov5_s/epoch_30.pth'
train_cfg = dict(max_epochs=3)
