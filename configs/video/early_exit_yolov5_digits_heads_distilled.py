# As early_exit_yolov5_digits_heads.py; the heads also learn from the detector's own output.
_base_ = './early_exit_yolov5_digits_heads.py'
model = dict(distillation=dict(weight=1.0))
