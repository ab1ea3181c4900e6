"""The documentation's examples import what is there."""

import importlib
import re

import pytest

from conftest import ROOT

IMPORTS = [
    (page.name, module, names)
    for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
    for module, names in re.findall(
        r'^ *from (dynamicdet[\w.]*) import ([\w, ]+)$', page.read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize('page, module, names', IMPORTS)
def test_examples_import_what_is_there(page, module, names):
    for name in names.split(','):
        assert hasattr(importlib.import_module(module), name.strip()), f'{page}: {module}.{name}'


def test_examples_are_found():
    assert {'README.md', 'routing.md', 'serving.md'} <= {page for page, _, _ in IMPORTS}
