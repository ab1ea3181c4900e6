"""Tests that load OpenVINO, marked so, run in a process of their own: what it loads stays in a
process, and other tests fork data workers."""

from pathlib import Path

import pytest

from conftest import ROOT, run_tool

#: What is in a file with such tests.
MARKS = 'mark.openvino', 'RUNTIMES_TO_TRY'
FILES = [
    str(path)
    for folder in ('tests', 'experiments/tests')
    for path in sorted((ROOT / folder).rglob('test_*.py'))
    if path != Path(__file__) and any(mark in path.read_text() for mark in MARKS)
]


def test_what_loads_openvino():
    run_tests = Path(pytest.__file__).with_name('__main__.py')
    done = run_tool(run_tests, '-q', '-m', 'openvino', '--durations=5', *FILES, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
