"""The main job on the built-in data set, by the commands that a user would type.

Makes the data, trains the cascade and then the router, calibrates, tests at half hard, and writes
the report. Killed, it goes on where it was; done, it only writes the report again.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--report', default='work_dirs/demo/report', help='where the report goes')
    return parser.parse_args()


if __name__ == '__main__':
    # Before seconds of imports: --help and mistakes are answered at once.
    parse_args()

from dynamicdet import cli
from dynamicdet.files import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/dy_faster_rcnn_digits.py'
ROUTER = 'configs/dy_faster_rcnn_digits_router.py'
#: The figures in the README are from two; more would see other batches.
PROCESSES = 2


def run(title: str, *command: str, **environment: str) -> None:
    """Run a command in the repository's root; end with it if it fails."""
    print(f'\n== {title}\n   {shlex.join(command)}\n', flush=True)
    # This environment's python first, also where it was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    start = time.monotonic()
    code = subprocess.run(
        command, cwd=ROOT, env={**os.environ, 'PATH': path, **environment}
    ).returncode
    if code:
        sys.exit(code)
    print(f'   took {time.monotonic() - start:.0f} s', flush=True)


def train(title: str, config: str) -> None:
    """Train with two processes of one thread each: nearly twice as fast as one process with two."""
    run(
        title,
        'bash',
        'tools/dist_train.sh',
        config,
        str(PROCESSES),
        '--resume',
        OMP_NUM_THREADS='1',
    )


def main() -> None:
    """Run all steps on the built-in data, one process each."""
    args = parse_args()
    start = time.monotonic()
    run('1/6 data: handwritten digits over photographs', 'python', 'tools/make_digits.py')
    train('2/6 step 1: the cascade of two detectors', CONFIG)
    train('3/6 step 2: the router', ROUTER)
    checkpoint = latest_checkpoint(ROOT / 'work_dirs' / Path(ROUTER).stem)
    checkpoint = os.path.relpath(checkpoint, ROOT)
    run('4/6 calibration on the validation set', 'python', 'tools/calibrate.py', ROUTER, checkpoint)
    run(
        '5/6 test with half of the images hard',
        'python',
        'tools/test.py',
        ROUTER,
        checkpoint,
        '--hard-share',
        '0.5',
    )
    run(
        '6/6 report on the test set',
        'python',
        'tools/report.py',
        ROUTER,
        checkpoint,
        '--out-dir',
        args.report,
        '--view',
        'shift',
    )
    print(f'\nAll in {(time.monotonic() - start) / 60:.1f} minutes. Open {args.report}/report.html')


if __name__ == '__main__':
    cli.run(main)
