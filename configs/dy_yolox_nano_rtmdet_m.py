# A pair: YOLOX-nano on every image, RTMDet-m on those that need it. Two published detectors as they are: nothing is
# trained but the router (tools/make_dynamic.py). Their checkpoints go by one name, exits://NANO.pth,RTMDET.pth.
_base_ = ['mmdet::yolox/yolox_nano_8xb8-300e_coco.py', './_base_/dynamic.py']
from dynamicdet.configs import by_type, model_of
nano = _base_.model
exits = [nano, model_of('mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py')]
model = dict(
    _delete_=True,
    type='DynamicDetector',
    detector=exits,
    backbone=[one.backbone for one in exits],
    scales=(0.65, 1),   # 416 pixels, as YOLOX-nano was published, and 640
    objective='ap')     # losses of different heads do not compare
test_pipeline = by_type(_base_.test_pipeline, Resize=dict(scale=_base_.img_scale))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))     # RTMDet's head holds parameters more than once
custom_hooks = by_type(
    _base_.custom_hooks, YOLOXModeSwitchHook=dict(type='BranchModeSwitchHook')) + _base_.dynamic_hooks
visualizer = dict(type='DynamicVisualizer')
