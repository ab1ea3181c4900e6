"""Settings of a run of the tests.

``TEST_THREADS`` (1) and ``TEST_SEED`` (0) in the environment run the suite with other threads, and
train and draw from another seed: no test may hang on either. ``CHROMIUM`` names the program of the
browser; without one, tests in it are left out, or fail if ``TEST_BROWSER=required``.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Two threads that wait for each other cost more than one on models this small.
THREADS = int(os.environ.get('TEST_THREADS', 1))
SEED = int(os.environ.get('TEST_SEED', 0))
CHROMIUM = os.environ.get('CHROMIUM') or next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
BROWSER_REQUIRED = os.environ.get('TEST_BROWSER') == 'required'
