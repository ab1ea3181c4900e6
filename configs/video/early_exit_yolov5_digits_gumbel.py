# As early_exit_yolov5_digits.py, with gates that are trained with the detector.
_base_ = './early_exit_yolov5_digits.py'
model = dict(gate=dict(type='GumbelGate', cost_weight=0.3))
