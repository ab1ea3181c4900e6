# As early_exit_yolov5_digits.py; the heads also learn from the detector's own output.
_base_ = './early_exit_yolov5_digits.py'
model = dict(distillation=dict(weight=1.0))
