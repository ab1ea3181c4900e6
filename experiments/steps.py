"""What the experiments share: steps that run tools, several at a time, and wait for each other."""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from dynamicdet.files import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
#: mmengine reads a config as a module of a fixed name: one at a time.
reading = threading.Lock()
_started: dict[str, Future] = {}


def make_parser(said: str, what: str) -> argparse.ArgumentParser:
    """The command line of an experiment whose steps are called ``what``."""
    parser = argparse.ArgumentParser(description=said)
    parser.add_argument(
        '--only', nargs='+', default=[''], help=f'{what} whose names contain one of these'
    )
    parser.add_argument('--jobs', type=int, default=2, help=f'{what} at a time, of one thread each')
    parser.add_argument('--list', action='store_true', help='say what there is to do, and stop')
    return parser


def run(*command: str, log: Path) -> None:
    """Run a tool in the repository's root, its output into a file; end with it if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        code = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        ).returncode
    if code:
        raise RuntimeError(f'{command[0]} failed with status {code}: see the end of {log}')


def train_once(folder: Path, write_config: Callable[[], Path]) -> str:
    """Train what a function writes, or go on with it; its last checkpoint."""
    if not (folder / 'trained').exists():
        run(
            'tools/train.py',
            str(write_config()),
            '--no-data-check',
            '--resume',
            f'--work-dir={folder}',
            log=folder / 'train.log',
        )
        (folder / 'trained').touch()
    return latest_checkpoint(str(folder))


def wait_for(*names: str | None) -> None:
    """Until these steps of this call are done; those that are none of it are done."""
    for name in names:
        if name in _started:
            _started[name].result()


def do_all(names: Sequence[str], do: Callable[[str], None], jobs: int) -> None:
    """Do steps, so many at a time, and say what is done and how long the rest takes.

    Args:
        names (Sequence[str]): In an order in which none waits for a later one.
        do (Callable): Does one.
        jobs (int): At a time.
    """

    def timed(name: str) -> str:
        begin = time.monotonic()
        do(name)
        return f'{name}: {(time.monotonic() - begin) / 60:.1f} min'

    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for name in names:
            _started[name] = pool.submit(timed, name)
        for done, future in enumerate(as_completed([_started[name] for name in names]), 1):
            if future.exception():
                # Said now, and not when all others are done, hours later.
                pool.shutdown(wait=False, cancel_futures=True)
            left = (time.monotonic() - start) / done * (len(names) - done)
            print(f'[{done}/{len(names)}] {future.result()}, {left / 60:.0f} min left', flush=True)
