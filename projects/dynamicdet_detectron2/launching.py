"""Processes of a training: Detectron2's on GPUs; on a CPU the same with gloo, which it has not."""

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_on_gpus
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from dynamicdet.errors import UsageError

#: Status of a process whose user got something wrong.
_WRONG = 2


def launch(
    main: Callable,
    processes: int,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = 'auto',
    args: Sequence = (),
) -> None:
    """Run a function in several processes. A `UsageError` in any of them is one line on stderr, and
    ends this one with status 2.

    Args:
        main (Callable): Of ``args``; importable by its name.
        processes (int): Of each machine: GPUs or, where there is none, processes of the CPU.
        machines (int), machine_rank (int), url (str): As Detectron2's ``launch`` takes them.
        args (Sequence): Of the function.

    Raises:
        UsageError: If there are not so many GPUs.
    """
    if processes * machines == 1:
        main(*args)
        return
    cuda = torch.cuda.is_available()
    if cuda and processes > torch.cuda.device_count():
        raise UsageError(
            f'--num-gpus {processes}: this machine has {torch.cuda.device_count()} GPUs'
        )
    with tempfile.TemporaryDirectory() as folder:
        said = os.path.join(folder, 'said')
        try:
            if cuda:
                launch_on_gpus(
                    _quiet, processes, machines, machine_rank, url, args=(main, said, *args)
                )
            else:
                if machines > 1:
                    raise UsageError(
                        'several machines train on GPUs: torch sees none here (--num-machines 1)'
                    )
                given = (processes, f'tcp://127.0.0.1:{_free_port()}', main, said, *args)
                mp.spawn(_on_cpu, given, processes)
        except ProcessExitedException as error:
            if error.exit_code != _WRONG:
                raise
            sys.exit(_WRONG)


def _on_cpu(rank: int, count: int, url: str, *given) -> None:
    dist.init_process_group('gloo', init_method=url, world_size=count, rank=rank)
    comm._LOCAL_PROCESS_GROUP = dist.new_group(list(range(count)))
    try:
        _quiet(*given)
    finally:
        dist.destroy_process_group()


def _quiet(main: Callable, said: str, *args) -> None:
    """Run it; say what the user got wrong once, whichever process is first."""
    try:
        main(*args)
    except UsageError as error:
        try:
            os.close(os.open(said, os.O_CREAT | os.O_EXCL))
            print(f'error: {error}', file=sys.stderr, flush=True)
        except OSError:
            pass
        # Without a goodbye to the others, who may be waiting in a collective call.
        os._exit(_WRONG)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        return taken.getsockname()[1]


def distributed(model: nn.Module, **settings) -> nn.Module:
    """As Detectron2's ``create_ddp_model``, which takes models on GPUs alone."""
    if next(model.parameters()).device.type == 'cpu':
        settings['device_ids'] = None
    return create_ddp_model(model, **settings)
