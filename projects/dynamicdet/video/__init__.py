"""Early exits in video: a detector that computes no further than a frame needs."""
from .early_exit_detector import EarlyExitDetector
from .evidence import AllExits, Evidence
from .gates import AgreementGate, FixedExit, Gate, ScoreGate, TemporalGate
from .heads import ExitHead
from .learned_gates import GumbelGate, HaltingGate
from .presence import Presence
from .propagation import Propagation

__all__ = [
    'AgreementGate', 'AllExits', 'EarlyExitDetector', 'Evidence', 'ExitHead', 'FixedExit', 'Gate',
    'GumbelGate', 'HaltingGate', 'Presence', 'Propagation', 'ScoreGate', 'TemporalGate'
]
