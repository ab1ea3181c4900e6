# The heads of early_exit_yolov5_digits.py on the frozen detector of yolov5_digits_video.py.
_base_ = './early_exit_yolov5_digits.py'
model = dict(mode='heads_only')
load_from = 'work_dirs/yolov5_digits_video/epoch_3.pth'
