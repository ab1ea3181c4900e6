"""Tests that load OpenVINO, marked so, run in a process of their own: what it loads stays in a
process, and other tests fork data workers."""

import subprocess
import sys

from conftest import ROOT

FILES = (
    'tests/test_deploy/test_parts_graphs.py',
    'tests/test_deploy/test_deployed_regions.py',
    'tests/test_deploy/test_roi_align.py',
    'experiments/tests/test_dynamic_compressed.py',
)


def test_what_loads_openvino():
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-m', 'openvino', *FILES],
        cwd=ROOT,
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
