"""Pages for users: links, names of tools and modules that exist, configs that load, and length."""

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from test_layout import PACKAGE, ROOMS

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
    shared = ''.join(
        (ROOT / file).read_text()
        for file in ('projects/dynamicdet_options.py', 'experiments/steps.py')
    )
    text = re.sub(r'\\\n\s*', ' ', page.read_text())
    for tool, rest in re.findall(
        r'^ {4,}.*python ((?:tools|experiments)/\w+\.py)(.*)$', text, re.M
    ):
        # Those of tools/make_digits.py are its splits.
        source = (ROOT / tool).read_text() + shared + ''.join(f"'--{split}'" for split in SIZES)
        options = re.findall(r'(?<= )--[a-z][\w-]*', rest.split('#')[0])
        assert not [option for option in options if f"'{option}'" not in source], tool


CODE_SPAN = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_options_in_sentences_and_tables_exist(page):
    sources = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ('tools', 'experiments')
        for path in (ROOT / folder).rglob('*.py')
    }
    shared = "'--help'" + (ROOT / 'projects/dynamicdet_options.py').read_text()
    unknown = []
    for span in CODE_SPAN.findall(prose_of(page.read_text())):
        tool = re.match(r'(?:python )?((?:tools|experiments)/\w+\.py)', span)
        if tool or span.startswith('--'):
            code = shared + (sources[tool[1]] if tool else ''.join(sources.values()))
            options = re.findall(r'(?<![\w-])--[a-z][\w-]*', span)
            unknown += [option for option in options if f"'{option}'" not in code]
    assert not unknown


def names_in_code():
    """Names by the package's module, without comments and docstrings; and all of the repository."""
    by_module, everywhere = {}, set()
    for path in (
        path
        for folder in ('projects', 'tools', 'experiments', 'tests', 'configs')
        for path in (ROOT / folder).rglob('*.py')
    ):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # What is registered or looked up by a name; a docstring has spaces.
                names |= set() if ' ' in node.value else set(re.findall(r'\w+', node.value))
            for field in ('id', 'attr', 'arg', 'name', 'asname', 'module'):
                names |= set(str(getattr(node, field, None)).split('.'))
        everywhere |= names
        if PACKAGE in path.parents:
            module = path.parent if path.name == '__init__.py' else path.with_suffix('')
            by_module[module.relative_to(PACKAGE.parent).parts] = names
    return by_module, everywhere


def unknown_names(text, by_module, everywhere):
    """Code spans that are names, plain or after their module's, but of nothing that there is."""
    unknown = []
    for span in CODE_SPAN.findall(text):
        parts = tuple(span.removesuffix('()').split('.'))
        *head, last = parts
        if not all(part.isidentifier() for part in parts) or last == 'py':
            continue
        is_module = any(module[-len(parts) :] == parts for module in by_module)
        inside = [
            names for module, names in by_module.items() if list(module[-len(head) :]) == head
        ]
        if not is_module and not any(last in names for names in inside or [everywhere]):
            unknown.append(span)
    return unknown


def test_comments_name_what_there_is():
    there = {('video', 'gates'): {'Gate'}}, {'Gate'}
    assert unknown_names('`gates`, `gates.Gate`, `gone`, `gates.gone`', *there) == [
        'gone',
        'gates.gone',
    ]
    names = names_in_code()
    unknown = {
        str(path.relative_to(ROOT)): found
        for path in (ROOT / 'projects').rglob('*.py')
        if (found := unknown_names(path.read_text(), *names))
    }
    assert not unknown


def test_changelog_names_what_there_is_now():
    rows = re.findall(r'^\|.*\| (.*) \|$', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert len(rows) > 40 and unknown_names('\n'.join(rows), *names_in_code()) == []


def missing_before(page):
    """What a page's trainings need that no command before them makes: data, or weights."""
    makers = {
        'data/digits/': 'tools/make_digits.py',
        'data/digits_video/': 'tools/make_digits_video.py',
    }
    done, missing = '', []
    for command in re.findall(r'^ {4,}(python tools/.*)$', page.read_text(), re.M):
        config = re.match(r'python tools/train\.py (configs/\S+)', command)
        if config and (ROOT / config[1]).exists():
            cfg = Config.fromfile(ROOT / config[1])
            needed = [makers.get(cfg.get('data_root'), '')]
            if (cfg.get('load_from') or '').startswith('work_dirs/'):
                needed.append(f'/{Path(cfg.load_from).parent.name}.py')
            missing += [f'{config[1]} needs {one}' for one in needed if one not in done]
        done += command
    return missing


def test_pages_make_what_they_train_on(tmp_path):
    page = tmp_path / 'page.md'
    start = '    python tools/make_digits.py\n    python tools/train.py configs/faster_rcnn_digits'
    page.write_text(f'{start}_pruned.py\n')
    assert missing_before(page) == [
        'configs/faster_rcnn_digits_pruned.py needs /faster_rcnn_digits.py'
    ]
    assert [missing for page in USER_PAGES for missing in missing_before(page)] == []


@pytest.mark.parametrize('page', USER_PAGES, ids=name_of)
def test_what_pages_import_exists(page):
    for module, names in re.findall(
        r'^ *from (dynamicdet(?:\.\w+)*) import ([\w, ]+)$', page.read_text(), re.M
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
        r'^ *from (dynamicdet(?:\.\w+)*) import ([\w, ]+)$', page.read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize('page, module, names', IMPORTS)
def test_examples_import_what_is_there(page, module, names):
    for name in names.split(','):
        assert hasattr(importlib.import_module(module), name.strip()), f'{page}: {module}.{name}'


def test_examples_are_found():
    assert {'README.md', 'routing.md', 'budgets.md'} <= {page for page, _, _ in IMPORTS}
