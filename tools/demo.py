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

from dynamicdet.apis import cli
from dynamicdet.engine import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/dy_faster_rcnn_digits.py'
ROUTER = 'configs/dy_faster_rcnn_digits_router.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--report', default='work_dirs/demo/report', help='where the report goes')
    return parser.parse_args()


def run(title: str, tool: str, *arguments: str) -> None:
    """Run one of the tools in the repository's root; end with it if it fails."""
    command = [f'tools/{tool}.py', *arguments]
    print(f'\n== {title}\n   python {shlex.join(command)}\n', flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)
    print(f'   took {time.monotonic() - start:.0f} s', flush=True)


def main() -> None:
    args = parse_args()
    # Idle threads of one process must not spin while another, such as a data worker, wants the core.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    start = time.monotonic()
    run('1/6 data: handwritten digits over photographs', 'make_digits')
    run('2/6 step 1: the cascade of two detectors', 'train', CONFIG, '--resume')
    run('3/6 step 2: the router', 'train', ROUTER, '--resume')
    checkpoint = latest_checkpoint(ROOT / 'work_dirs' / Path(ROUTER).stem)
    checkpoint = os.path.relpath(checkpoint, ROOT)
    run('4/6 calibration on the validation set', 'calibrate', ROUTER, checkpoint)
    run('5/6 test with half of the images hard', 'test', ROUTER, checkpoint, '--hard-share', '0.5')
    run('6/6 report on the test set', 'report', ROUTER, checkpoint, '--out-dir', args.report)
    print(f'\nAll in {(time.monotonic() - start) / 60:.1f} minutes. Open {args.report}/report.html')


if __name__ == '__main__':
    cli.run(main)
