"""Pages for users: links, names of tools and modules that exist, configs that load, and length."""

import importlib
import re
import shutil

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from test_layout import ROOMS

from conftest import ROOT
from dynamicdet.datasets.digits import SIZES
from mmdet.registry import MODELS

USER_PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
PAGES = [
    *USER_PAGES,
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'CHANGELOG.md',
    *sorted((ROOT / 'experiments').glob('*.md')),
    *sorted((ROOT / 'experiments' / 'results').glob('*.md')),
]
MOST_WORDS = 1000
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)


def name_of(page):
    return str(page.relative_to(ROOT))


def prose_of(text):
    """Without code: neither fenced nor indented by four spaces or more."""
    return re.sub(r'^ {4,}.*$', '', FENCE.sub('', text), flags=re.M)


def anchors_of(text):
    """GitHub's: lower case, spaces to hyphens, all else that is no letter or digit left out."""
    titles = re.findall(r'^#+ (.*)$', FENCE.sub('', text), re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


def broken_links(page):
    broken = []
    for target in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', page.read_text())):
        if re.match(r'[a-z]+:', target):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or anchor and anchor not in anchors_of(file.read_text()):
            broken.append(target)
    return broken


def words_of(text):
    """Words of prose and tables; the target of a link is none."""
    return re.findall(r"[A-Za-z][\w'-]*", re.sub(r'\]\([^)]*\)', ']', prose_of(text)))


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# A title, `here`\n[a](#a-title-here) [b](#gone) [c](gone.md) [d](page.md)\n')
    assert broken_links(page) == ['#gone', 'gone.md']
    assert words_of('Two words\n\n    python tools/x.py\n') == ['Two', 'words']


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize('page', USER_PAGES, ids=name_of)
def test_pages_for_users_are_short(page):
    assert len(words_of(page.read_text())) <= MOST_WORDS


def test_architecture_has_the_rooms_of_the_package():
    rows = re.findall(r'^\| (`.*?) \|', (ROOT / 'docs' / 'architecture.md').read_text(), re.M)
    assert [set(re.findall(r'`(\w+)/?`', row)) for row in rows] == [set(rooms) for rooms in ROOMS]


def test_readme_fits_on_three_screens():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_programs_and_configs_that_are_named_exist(page):
    named = re.findall(
        r'(?<![\w/.])(?:tools|experiments)/[\w/]+\.(?:py|sh)\b', page.read_text()
    ) + re.findall(r'(?<![\w/.])configs/[\w/-]+\.py\b', page.read_text())
    # Those that the reader is to write.
    own = re.compile('/my_|NAME')
    missing = {name for name in named if not own.search(name) and not (ROOT / name).exists()}
    assert not missing


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_options_of_commands_exist(page):
    shared = (ROOT / 'projects/dynamicdet_options.py').read_text()
    text = re.sub(r'\\\n\s*', ' ', page.read_text())
    for tool, rest in re.findall(r'^ {4,}.*python (tools/\w+\.py)(.*)$', text, re.M):
        # Those of tools/make_digits.py are its splits.
        source = (ROOT / tool).read_text() + shared + ''.join(f"'--{split}'" for split in SIZES)
        options = re.findall(r'(?<= )--[a-z][\w-]*', rest.split('#')[0])
        assert not [option for option in options if f"'{option}'" not in source], tool


@pytest.mark.parametrize('page', USER_PAGES, ids=name_of)
def test_what_pages_import_exists(page):
    for module, names in re.findall(
        r'^ *from (dynamicdet[\w.]*) import ([\w, ]+)$', page.read_text(), re.M
    ):
        for name in names.split(','):
            assert hasattr(importlib.import_module(module), name.strip()), f'{module}: {name}'


@pytest.mark.parametrize('name', ['my_yolox', 'my_faster_rcnn'])
def test_configs_for_own_data_make_both_steps(name, tmp_path):
    """As printed: written beside the shipped ones, they build."""
    configs = shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    blocks = [text for _, text in FENCE.findall((ROOT / 'docs' / 'own_data.md').read_text())]
    for text in blocks:
        first = re.match(r'# configs/(\w+\.py)', text)
        if first:
            (configs / first[1]).write_text(text)
    for config, step in ((f'{name}.py', 1), (f'{name}_router.py', 2)):
        cfg = Config.fromfile(configs / config)
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(cfg.model)
        heads = [part for part in model.modules() if getattr(part, 'num_classes', 0)]
        # An RPN has one.
        assert {head.num_classes for head in heads} - {1} == {len(cfg.metainfo.classes)}
        trained = {key.split('.')[0] for key, one in model.named_parameters() if one.requires_grad}
        assert ('router' in trained) == (step == 2)
        assert (trained == {'router'}) == (step == 2)
        datasets = [cfg[f'{part}_dataloader'].dataset for part in ('train', 'val', 'test')]
        for part, dataset in zip(('train', 'val', 'test'), datasets):
            while 'dataset' in dataset:
                dataset = dataset.dataset
            assert dataset.data_root == 'data/mine/'
            assert dataset.ann_file == f'annotations/{part}.json'
            assert dataset.metainfo == cfg.metainfo
        assert 'Mosaic' not in str(cfg.train_dataloader.dataset.get('pipeline')) or step == 1
        assert 0 < cfg.router_holdout < 1


IMPORTS = [
    (page.name, module, names)
    for page in USER_PAGES
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
