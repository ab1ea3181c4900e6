"""What a cascade of detectors is, whatever framework they are of: composite backbones, batches on
their way, thresholds, weights by name, what a router learns from; torch and numpy alone."""

from .calibration_state import CalibrationState
from .composite import CompositeNets, Connection

__all__ = ['CalibrationState', 'CompositeNets', 'Connection']
