"""From difficulties to thresholds, and what a router learns; numpy and torch alone."""

from .budget import Budget
from .class_weights import class_weights
from .objective import (
    FITS,
    GAINS,
    OBJECTIVES,
    Objective,
    build_objective,
    check_objective,
    class_aps,
    image_aps,
    offset_of,
    quantiles_of,
    ranks_of,
)
from .thresholds import hard_share, resolve_threshold, share_for_latency, threshold_for_share

__all__ = [
    'Budget',
    'FITS',
    'GAINS',
    'OBJECTIVES',
    'Objective',
    'build_objective',
    'check_objective',
    'class_aps',
    'class_weights',
    'hard_share',
    'image_aps',
    'offset_of',
    'quantiles_of',
    'ranks_of',
    'resolve_threshold',
    'share_for_latency',
    'threshold_for_share',
]
