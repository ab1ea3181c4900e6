from .atomic_backend import AtomicBackend, write_atomically
from .branch_mode_switch_hook import BranchModeSwitchHook
from .complete_checkpoint_hook import CompleteCheckpointHook
from .finite_loss_hook import FiniteLossHook
from .fuse_hook import FuseHook
from .online_hook import OnlineHook
from .pruning_hook import PruningHook
from .resume_hook import ResumeHook
from .router_hook import RouterHook, latest_checkpoint
from .weight_sharing_hook import WeightSharingHook

__all__ = [
    'AtomicBackend', 'BranchModeSwitchHook', 'CompleteCheckpointHook', 'FiniteLossHook', 'FuseHook',
    'OnlineHook', 'PruningHook', 'ResumeHook', 'RouterHook', 'WeightSharingHook', 'latest_checkpoint',
    'write_atomically'
]
