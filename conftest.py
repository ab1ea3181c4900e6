"""What all tests share. Without OpenMMLab's packages, tests/test_routing and tests/test_compression
run."""

import gc
import importlib.util
import os
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch

# Tests import some of them from here.
from suite_settings import BROWSER_REQUIRED, CHROMIUM, ROOT, SEED, THREADS  # noqa: F401

from dynamicdet.routing.record import RoutingRecord

if importlib.util.find_spec('mmdet'):
    from detector_cases import *  # noqa: F403

torch.set_num_threads(THREADS)
os.environ['OMP_NUM_THREADS'] = str(THREADS)

#: For tests of what runs graphs; see test_deploy/test_openvino.py.
RUNTIMES_TO_TRY = ('onnxruntime', pytest.param('openvino', marks=pytest.mark.openvino))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Whatever a test or its fixtures draw without a seed of their own, they draw in any order of
    tests."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


#: Parts of paths of tests that take longest, for each test: of whole processes. They are begun
#: first, so that no worker is left with one of them while the others are done.
LONGEST_FIRST = (
    'test_web',
    'test_tools',
    'experiments',
    'test_engine',
    'test_video',
    'test_measuring',
)


def pytest_collection_modifyitems(config, items):
    """The longest first; and leave out what needs a GPU or a browser where there is none, which
    `pytest_terminal_summary` says."""
    items.sort(
        key=lambda item: next(
            (at for at, part in enumerate(LONGEST_FIRST) if part in item.path.parts),
            len(LONGEST_FIRST),
        )
    )
    left_out = [item for item in items if any(map(item.get_closest_marker, _reasons()))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """A data set calls ``gc.collect()`` when it has loaded: it need not go through all of mmdet."""
    gc.collect()
    gc.freeze()


def _reasons() -> dict[str, str]:
    """Mark -> why tests that bear it are left out on this machine."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons['gpu'] = 'torch sees no GPU (tools/check_gpu.sh)'
    if not (CHROMIUM or BROWSER_REQUIRED):
        reasons['browser'] = 'there is no Chromium (apt install chromium, or CHROMIUM=/path/to/it)'
    return reasons


def pytest_terminal_summary(terminalreporter):
    for mark, reason in _reasons().items():
        terminalreporter.write_line(f'tests marked {mark} were left out: {reason}')


def rebuilt(record: RoutingRecord, images: Iterable[dict] | None = None, **facts) -> RoutingRecord:
    """A record of other images, or with other costs or provenance."""
    kept = dict(
        gflops=record.gflops, latencies=record.latencies, provenance=dict(record.provenance)
    )
    return RoutingRecord.from_images(list(record if images is None else images), **kept | facts)
