"""Tests that load OpenVINO, marked so, run in a process of their own: what it loads stays in a
process, and other tests fork data workers."""

from pathlib import Path

import pytest

from conftest import run_tool

FILES = (
    'tests/test_deploy/test_parts_graphs.py',
    'tests/test_deploy/test_deployed_regions.py',
    'tests/test_deploy/test_roi_align.py',
    'experiments/tests/test_dynamic_compressed.py',
)


def test_what_loads_openvino():
    run_tests = Path(pytest.__file__).with_name('__main__.py')
    done = run_tool(run_tests, '-q', '-m', 'openvino', '--durations=5', *FILES, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
