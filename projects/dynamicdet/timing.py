"""The clock; what seconds were measured on, and whether they hold here."""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .progress import Progress

Key = TypeVar('Key', bound=Hashable)
Result = TypeVar('Result')

#: What seconds depend on, beside the detector.
_CONDITIONS = ('runtime', 'provider', 'device', 'threads', 'dtype')


def now(device: torch.device) -> float:
    """Seconds, once a device has done all it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_call(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that a call takes, until a device has done what it was given; and what it returns."""
    start = now(device)
    result = run()
    return now(device) - start, result


def time_in_turns(
    runs: Mapping[Key, Callable[[Any], Any]],
    inputs: Sequence[Any],
    device: torch.device,
    progress: Progress,
    rounds: int = 5,
    forcing: Callable[[Key], contextlib.AbstractContextManager | None] = lambda key: None,
) -> dict[Key, float]:
    """Median seconds of calls that take turns: what disturbs a machine disturbs all of them.

    Args:
        runs (Mapping): Name -> a function of one input.
        inputs (Sequence): What each is called with, in each round.
        device (torch.device): Where they compute.
        progress (Callable): Wraps the rounds.
        rounds (int): How often each input is timed, after one untimed round. Defaults to 5.
        forcing (Callable, optional): Is called with the name before each call, untimed; a context
            manager that it returns is entered around the call.
    """
    times: dict[Key, list[float]] = {name: [] for name in runs}
    for turn in progress(range(rounds + 1), 'latencies'):
        for single_input in inputs:
            for name, run in runs.items():
                with forcing(name) or contextlib.nullcontext():
                    seconds, _ = time_call(lambda: run(single_input), device)
                times[name] += [seconds] * (turn > 0)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def machine_of(device: str | torch.device, threads: int | None = None) -> dict[str, object]:
    """``device``, by the processor's name, and ``threads`` (torch's by default)."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name()
    return dict(device=name, threads=threads or torch.get_num_threads())


def dtype_of(model: torch.nn.Module) -> str:
    """What a model computes in as it stands, such as 'float32'."""
    dtype = next(
        (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()),
        torch.float32,
    )
    return str(dtype).removeprefix('torch.')


def _cpu_name() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            names = [line.split(':')[1].strip() for line in file if line.startswith('model name')]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name}, {os.cpu_count()} cores'


def timed_elsewhere(then: Mapping[str, object], here: Mapping[str, object]) -> str | None:
    """A sentence where latencies were measured under other conditions than those here; None where
    they were not, or where nothing says how they were measured.

    Args:
        then, here (Mapping): ``runtime``, ``provider``, ``device``, ``threads``, ``dtype``: those
            that are known.
    """
    odd = [
        name for name in _CONDITIONS if name in then and name in here and then[name] != here[name]
    ]
    if not odd:
        return None
    was, now = (', '.join(f'{name} {facts[name]}' for name in odd) for facts in (then, here))
    return (
        f'latencies were measured with {was}, and here it is {now}: a target latency is met only '
        'if measured anew'
    )
