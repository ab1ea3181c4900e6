"""Runs tools in processes of their own that need not import torch and mmdet anew.

A server imports them once and forks for each tool: what a test runs is ``tools/NAME.py`` as
``__main__`` with its own arguments, folder and environment, but four seconds sooner. It can be
killed, and it can be several ranks.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class ToolServer:
    """A process that forks tools; it ends with the one that started it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(
        self,
        script: Path,
        arguments: list,
        cwd: Path,
        environment: dict,
        outputs: tuple[Path, Path],
        timeout: float,
        ranks: int = 1,
    ) -> int:
        """Fork, one after the other is done (`wait`).

        Args:
            outputs: What is printed is appended to these files.
            ranks: Processes with ``RANK`` and the rest of what ``torch.distributed.run`` says, but
                for ``MASTER_ADDR`` and ``MASTER_PORT``. When one fails, the others are killed.

        Returns:
            int: The first process, which is also the group of all.
        """
        order = dict(
            argv=[str(script), *map(str, arguments)],
            cwd=str(cwd),
            environment=environment,
            outputs=[str(path) for path in outputs],
            timeout=timeout,
            ranks=ranks,
        )
        self._process.stdin.write(json.dumps(order).encode() + b'\n')
        return json.loads(self._process.stdout.readline())

    def ended(self) -> bool:
        """Whether what was started last has ended, for `wait` to be told how."""
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def wait(self) -> int | None:
        """The status of what was started last, the first that is not 0; None if it took longer
        than its timeout."""
        return json.loads(self._process.stdout.readline())

    def run(
        self,
        script: Path,
        arguments: list,
        cwd: Path,
        environment: dict,
        timeout: float,
        ranks: int = 1,
    ) -> subprocess.CompletedProcess:
        """As `subprocess.run` with captured output; see `start`."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = Path(folder, 'out'), Path(folder, 'err')
            self.start(script, arguments, cwd, environment, outputs, timeout, ranks)
            code, command = self.wait(), [str(script), *map(str, arguments)]
            if code is None:
                raise subprocess.TimeoutExpired(command, timeout)
            printed = (path.read_text(errors='replace') for path in outputs)
            return subprocess.CompletedProcess(command, code, *printed)


def _serve() -> None:
    # What is said of orders goes to where nothing prints, no tool and no import.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    from mmengine.hub import get_config
    from quick_configs import make_configs_quick

    import dynamicdet  # noqa: F401
    from dynamicdet import cli  # noqa: F401

    make_configs_quick()
    # What all forks then have.
    get_config('mmdet::_base_/default_runtime.py')
    gc.collect()
    gc.freeze()

    def answer(value: int | None) -> None:
        answers.write(json.dumps(value) + '\n')
        answers.flush()

    for line in sys.stdin:
        order = json.loads(line)
        group = 0
        for rank in range(order['ranks']):
            child = os.fork()
            if not child:
                _become(order, group, rank)
            group = group or child
            # Here and there: whichever comes first. It may be over.
            with contextlib.suppress(OSError):
                os.setpgid(child, group)
        answer(group)
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(group, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, order['timeout'])
        code = 0
        for left in reversed(range(order['ranks'])):
            _, status = os.waitpid(-group, 0)
            code = code or os.waitstatus_to_exitcode(status)
            if code and left:
                os.killpg(group, signal.SIGKILL)
        late = not signal.setitimer(signal.ITIMER_REAL, 0)[0]
        answer(None if late else code)


def _become(order: dict, group: int, rank: int) -> None:
    """Be the tool, in a process group of its own or in that of other ranks, and end."""
    code = 1
    try:
        os.setpgid(0, group)
        os.chdir(order['cwd'])
        os.environ.clear()
        os.environ.update(order['environment'])
        if order['ranks'] > 1:
            for name, value in (('RANK', rank), ('WORLD_SIZE', order['ranks'])):
                os.environ[name] = os.environ[f'LOCAL_{name}'] = str(value)
        for number, path in enumerate(order['outputs'], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
        sys.argv, sys.path[0] = order['argv'], str(Path(order['argv'][0]).parent)
        folders = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
        sys.path[1:1] = [folder for folder in folders if folder not in sys.path]
        runpy.run_path(order['argv'][0], run_name='__main__')
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            import multiprocessing.util

            multiprocessing.util._exit_function()
        os._exit(code)


if __name__ == '__main__':
    _serve()
