"""Object detectors that spend compute where the image needs it, for MMDetection.

Importing the package registers all it has; configs say ``custom_imports =
dict(imports=['dynamicdet'])``. Without MMDetection, `dynamicdet.routing` and
`dynamicdet.compression` are what there is.
"""

import importlib.util

from .version import __version__  # noqa: F401


def _has_mmdet() -> bool:
    try:
        return importlib.util.find_spec('mmdet') is not None
    except ImportError:
        return False


if _has_mmdet():
    # These register themselves.
    from . import apis, engine, models, video  # noqa: F401
    from .checkpoints import allow_mmengine_classes
    from .compression import ddz_loading  # noqa: F401
    from .datasets import holdout, mot, samplers  # noqa: F401
    from .deploy import folder  # noqa: F401

    allow_mmengine_classes()
