from .atomic_backend import AtomicBackend, write_atomically
from .finite_loss_hook import FiniteLossHook
from .resume_hook import ResumeHook
from .router_hook import RouterHook, latest_checkpoint

__all__ = [
    'AtomicBackend', 'FiniteLossHook', 'ResumeHook', 'RouterHook', 'latest_checkpoint',
    'write_atomically'
]
