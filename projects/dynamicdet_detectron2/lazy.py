"""Dynamic detectors in LazyConfig."""

from typing import Any

from detectron2.config import LazyCall

from .dynamic_detector import DynamicDetector


def make_dynamic(model: Any, **settings: Any) -> Any:
    """The config of a dynamic detector from that of a stock one.

    Args:
        model (DictConfig): LazyCall of the stock detector. Its settings are below
            ``model.detector.stock`` from here on.
        **settings: Arguments of `DynamicDetector`.

    Example:
        >>> model = make_dynamic(model_zoo.get_config('common/models/mask_rcnn_fpn.py').model)
        >>> model.detector.stock.roi_heads.num_classes = 10
    """
    # Without a target of its own, so that it is built when the dynamic detector asks for it, and as
    # often.
    return LazyCall(DynamicDetector)(detector=dict(stock=model), **settings)
