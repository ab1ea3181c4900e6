"""Hooks and backends for mmengine runs; importing registers them."""

from .atomic_backend import AtomicBackend
from .branch_mode_switch_hook import BranchModeSwitchHook
from .budget_hook import BudgetHook
from .complete_checkpoint_hook import CompleteCheckpointHook
from .finite_loss_hook import FiniteLossHook
from .fuse_hook import FuseHook
from .loaded_weights_hook import LoadedWeightsHook
from .online_hook import OnlineHook
from .pruning_hook import PruningHook
from .quantization_hook import QuantizationHook
from .resume_hook import ResumeHook
from .router_hook import RouterHook
from .validation_exits_hook import ValidationExitsHook
from .weight_sharing_hook import WeightSharingHook

__all__ = [
    'AtomicBackend',
    'BranchModeSwitchHook',
    'BudgetHook',
    'CompleteCheckpointHook',
    'FiniteLossHook',
    'FuseHook',
    'LoadedWeightsHook',
    'OnlineHook',
    'PruningHook',
    'QuantizationHook',
    'ResumeHook',
    'RouterHook',
    'ValidationExitsHook',
    'WeightSharingHook',
]
