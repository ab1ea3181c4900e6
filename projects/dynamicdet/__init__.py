"""Object detectors that spend compute where the image needs it, for MMDetection.

Importing the package registers all it has; configs say ``custom_imports = dict(imports=['dynamicdet'])``.
"""
from . import apis, engine, models, video  # noqa: F401  (they register themselves)
from .checkpoints import allow_mmengine_classes
from .compression import shrinking  # noqa: F401  (likewise)
from .datasets import holdout, mot, samplers  # noqa: F401  (likewise)
from .deploy import folder  # noqa: F401  (likewise)

__version__ = '0.1.0'

allow_mmengine_classes()
