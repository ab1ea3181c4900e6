# The heads alone, on a frozen YOLOv5s that was trained before: its own output stays as it is. Name its
# checkpoint: --cfg-options load_from=...
_base_ = './early_exit_yolov5_s.py'
model = dict(mode='heads_only', distillation=dict(weight=1.0))
