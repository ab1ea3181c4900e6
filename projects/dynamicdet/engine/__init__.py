from .atomic_backend import AtomicBackend, write_atomically
from .complete_checkpoint_hook import CompleteCheckpointHook
from .finite_loss_hook import FiniteLossHook
from .resume_hook import ResumeHook
from .router_hook import RouterHook, latest_checkpoint

__all__ = [
    'AtomicBackend', 'CompleteCheckpointHook', 'FiniteLossHook', 'ResumeHook', 'RouterHook',
    'latest_checkpoint', 'write_atomically'
]
