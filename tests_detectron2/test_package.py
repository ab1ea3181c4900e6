"""What the package is made of, and what the shipped configs say."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model

import dynamicdet_detectron2 as project
from conftest import ROOT, SMALL
from dynamicdet_detectron2 import DynamicDetector
from dynamicdet_detectron2.building import read_config
from dynamicdet_detectron2.lazy_training import load_config

CONFIGS = sorted((ROOT / 'configs/detectron2').glob('dy_*'))
YAML = [path for path in CONFIGS if path.suffix == '.yaml']
LAZY = [path for path in CONFIGS if path.suffix == '.py']


def test_no_openmmlab():
    import importlib.util

    for name in ('mmdet', 'mmcv', 'mmengine'):
        assert importlib.util.find_spec(name) is None
        for folder in ('projects/dynamicdet_detectron2', 'configs/detectron2'):
            for path in (ROOT / folder).rglob('*.*'):
                assert path.suffix == '.pyc' or name not in path.read_text().lower(), path


def test_variants_are_configs_of_15_lines():
    assert len(YAML) > 10 and len(LAZY) > 5
    for path in CONFIGS:
        # The main job's has a schedule of its own.
        limit = 25 if 'digits' in path.name else 15
        assert len(path.read_text().splitlines()) <= limit, path


@pytest.mark.parametrize('path', YAML, ids=lambda path: path.stem)
def test_yaml_configs_build(path):
    small = [value.strip("'") for value in SMALL]
    if 'X_101' in path.name:
        small += ['MODEL.RESNETS.NUM_GROUPS', '4', 'MODEL.RESNETS.WIDTH_PER_GROUP', '1']
    if 'digits' in path.name:
        small = []
    cfg = read_config(str(path), small)
    model = build_model(cfg)
    assert isinstance(model, DynamicDetector) and model.num_exits == 2
    assert Path(cfg.OUTPUT_DIR).name == path.stem


@pytest.mark.parametrize('path', LAZY, ids=lambda path: path.stem)
def test_lazy_configs_build(path):
    cfg = load_config(str(path))
    assert Path(cfg.train.output_dir).name == path.stem
    if 'fcos' in path.name:
        # See `small_fcos`.
        cfg.model.detector.stock.head.norm = ''
    model = instantiate(cfg.model)
    assert isinstance(model, DynamicDetector)


def tool(name, *arguments):
    done = subprocess.run(
        [sys.executable, f'tools/detectron2/{name}.py', *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_page_imports_and_names_what_there_is():
    more = (ROOT / 'docs/detectron2_more.md').read_text()
    start = (ROOT / 'docs/detectron2.md').read_text()
    page = start + more
    imports = re.findall(r'^ *from (dynamicdet_[\w.]*) import ([\w, ]+)$', page, re.M)
    assert imports
    for module, names in imports:
        for name in names.split(','):
            assert hasattr(importlib.import_module(module), name.strip())
    for name in re.findall(r'`((?:add|merge|register|make)_\w+)', page):
        assert hasattr(project, name) or hasattr(project.config, name), name
    cfg = get_cfg()
    project.add_dynamicdet_config(cfg)
    for setting in re.findall(r'^\| `([A-Z_.]+)`', start, re.M):
        node = cfg.MODEL.DYNAMIC
        for part in setting.split('.'):
            node = node[part]
    for setting in re.findall(r'^\| `([A-Z]+)` \| `\w+ = dict', more, re.M):
        assert setting in cfg.SOLVER
    for name in re.findall(r'`(\w+Hook)`', more):
        assert hasattr(project, name)
    for path in re.findall(r'(?:tools|configs)/detectron2/\w+\.(?:py|yaml)', page):
        assert (ROOT / path).is_file(), path


def test_versions_that_were_tested():
    # docs/detectron2.md says so.
    assert detectron2.__version__ == '0.6' and torch.__version__.startswith('2.14')
