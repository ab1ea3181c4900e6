"""Runs tools in processes of their own that need not import torch and mmdet anew.

A server imports them once and forks for each tool: what a test runs is ``tools/NAME.py`` as
``__main__`` with its own arguments, folder and environment, but four seconds sooner.
"""

import contextlib
import json
import os
import runpy
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
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, script: Path, arguments: list[str], cwd: Path, environment: dict, timeout: float
    ) -> subprocess.CompletedProcess:
        """As `subprocess.run` with captured output."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, 'out'), Path(folder, 'err')
            order = dict(
                argv=[str(script), *arguments],
                cwd=str(cwd),
                environment=environment,
                out=str(out),
                err=str(err),
                timeout=timeout,
            )
            self._process.stdin.write(json.dumps(order) + '\n')
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
            if code is None:
                raise subprocess.TimeoutExpired(order['argv'], timeout)
            return subprocess.CompletedProcess(
                order['argv'], code, *(path.read_text(errors='replace') for path in (out, err))
            )


def _serve() -> None:
    # What is said of orders goes to where nothing prints, no tool and no import.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    import dynamicdet  # noqa: F401
    from dynamicdet import cli  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            _become(order)
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, order['timeout'])
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(child, 0)
        late = not signal.setitimer(signal.ITIMER_REAL, 0)[0]
        answers.write(json.dumps(None if late else os.waitstatus_to_exitcode(status)) + '\n')
        answers.flush()


def _become(order: dict) -> None:
    """Be the tool, in a process group of its own, and end."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(order['cwd'])
        os.environ.clear()
        os.environ.update(order['environment'])
        for number, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
        sys.argv, sys.path[0] = order['argv'], str(Path(order['argv'][0]).parent)
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
