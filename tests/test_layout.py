"""What may import what: each row of `ROOMS` only from rows above it, and no files in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / 'projects' / 'dynamicdet'
ROOMS = [
    line.split()
    for line in """
    errors experimental version
    private_torch private_mmengine private_mmdet
    configs files transfers precision stand_ins progress
    timing
    annotations
    routing
    compression
    cascade
    exchange
    checkpoints
    reports datasets
    models
    interop building testing
    apis
    engine
    measuring
    deploy video
    serving bulk
    web
    cli
""".strip().splitlines()
]


def imports_of(path: Path) -> set:
    """Modules of the package that a file imports, anywhere in it, as paths below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or '').split('.'))
            for names in ([base / alias.name, base] for alias in node.names):
                files = [
                    file
                    for name in names
                    for file in (name.with_suffix('.py'), name / '__init__.py')
                ]
                found.add(next(file for file in files if file.is_file()))
    return found


FILES = {path: imports_of(path) for path in PACKAGE.rglob('*.py')}


def test_rooms_import_from_rooms_above_alone():
    # Or a wheel would lack it.
    assert all((path.parent / '__init__.py').is_file() for path in FILES)
    level = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    room_of = {path: path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in FILES}
    assert set(room_of.values()) == {*level, '__init__'}
    wrong = [
        f'{path.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}'
        for path, others in FILES.items()
        for other in others
        if room_of[path] not in (room_of[other], '__init__')
        and (room_of[other] == '__init__' or level[room_of[other]] >= level[room_of[path]])
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    # A package and its own modules import each other by nature: ``__init__`` names what is public.
    graph = {
        path: {
            other
            for other in others
            if other.name != '__init__.py' or other.parent not in path.parents
        }
        for path, others in FILES.items()
    }
    TopologicalSorter(graph).prepare()


#: Imports all of some rooms where OpenMMLab's packages cannot be imported.
_WITHOUT_OPENMMLAB = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmcv', 'mmengine'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
for room in ('routing', 'compression', 'cascade', 'exchange', 'reports'):
    package = importlib.import_module(f'dynamicdet.{room}')
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != 'ddz_loading':
            print(importlib.import_module(f'dynamicdet.{room}.{module.name}').__name__)
"""


def test_what_is_shared_by_frameworks_needs_no_openmmlab():
    done = subprocess.run(
        [sys.executable, '-c', _WITHOUT_OPENMMLAB], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) > 45
