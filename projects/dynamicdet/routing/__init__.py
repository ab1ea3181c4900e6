from .objective import WEIGHTINGS, router_loss, weigh
from .thresholds import hard_share, resolve_threshold, share_for_latency, threshold_for_share

__all__ = [
    'WEIGHTINGS', 'hard_share', 'resolve_threshold', 'router_loss', 'share_for_latency',
    'threshold_for_share', 'weigh'
]
