"""Early exits in video: a detector that computes no further than a frame needs."""

from .all_exits import AllExitsTestLoop, AllExitsValLoop, ExitsMetric
from .early_exit_detector import EarlyExitDetector
from .exit_curve_hook import ExitCurveHook
from .film_detector import FilmDetector
from .gate_inputs import AllExits, Evidence
from .gates import AgreementGate, FixedExit, Gate, ScoreGate, TemporalGate
from .heads import ExitHead
from .learned_gates import GumbelGate, HaltingGate
from .presence import Presence
from .propagation import Propagation

__all__ = [
    'AgreementGate',
    'AllExits',
    'AllExitsTestLoop',
    'AllExitsValLoop',
    'EarlyExitDetector',
    'Evidence',
    'ExitCurveHook',
    'ExitHead',
    'ExitsMetric',
    'FilmDetector',
    'FixedExit',
    'Gate',
    'GumbelGate',
    'HaltingGate',
    'Presence',
    'Propagation',
    'ScoreGate',
    'TemporalGate',
]
