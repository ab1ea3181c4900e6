"""--cfg-options: what is read from the command line, and how an overridden data_root moves
paths."""

import argparse

import pytest
from mmengine.config import Config

from dynamicdet.cli import ConfigOptions, override
from dynamicdet.errors import UsageError


def parse(*pairs):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions)
    return parser.parse_args(['--cfg-options', *pairs]).cfg_options


@pytest.mark.parametrize(
    'text, value',
    [
        ('3', 3),
        ('0.5', 0.5),
        ('true', True),
        ('None', None),
        ('a b', 'a b'),
        ('1,2', [1, 2]),
        ('[1,2]', [1, 2]),
        ('(1,2)', (1, 2)),
        ('(cat)', ('cat',)),
        ('("cat")', ('cat',)),
        ('[cat,dog]', ['cat', 'dog']),
        ('[(1,2),a]', [(1, 2), 'a']),
        # What is quoted is text, with its spaces and commas.
        ('["0","1"]', ['0', '1']),
        ('"0","1"', ['0', '1']),
        ('["a, b","c d"]', ['a, b', 'c d']),
        ('[[0.5,"1"],2]', [[0.5, '1'], 2]),
        ('[{"type":"SyncBuffersHook"}]', [dict(type='SyncBuffersHook')]),
        ('[{[]:1}]', ['{[]:1}']),
        ('[]', []),
    ],
)
def test_values(text, value):
    found = parse(f'key.inner={text}')['key.inner']
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    'text', ['/my data, set 1/', '(old) data/', '2024', '[a] b/', '"/my data, set 1/"']
)
def test_paths_are_text_as_they_stand(text):
    for name in (
        'data_root',
        'load_from',
        'work_dir',
        'val_evaluator.ann_file',
        'model.backbone.init_cfg.checkpoint',
    ):
        assert parse(f'{name}={text}')[name] == text.strip('"')
    assert parse('load_from=None')['load_from'] is None


@pytest.mark.parametrize(
    'pair, said',
    [
        ('x', 'KEY=VALUE'),
        ('=5', 'KEY=VALUE'),
        ('a..b=5', 'KEY=VALUE'),
        ('a=[1,2', 'brackets balanced'),
        ('a=f(1,2)', 'brackets balanced and around all of a list'),
        ('a={"classes":("0","1")}', 'give its entries one by one, as a.NAME=VALUE'),
        ('a=dict(b=1)', 'takes no dictionary'),
    ],
)
def test_what_is_no_option_is_said(pair, said, capsys):
    with pytest.raises(SystemExit):
        parse(pair)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line and pair in line


def moved(root, new, *options, **content):
    cfg = Config(dict(data_root=root, **content))
    override(cfg, parse(f'data_root={new}', *options), 'config')
    return cfg


@pytest.mark.parametrize('old', ['data/set', 'data/set/'])
@pytest.mark.parametrize('new', ['/other', '/other/'])
def test_data_root_moves_what_is_in_it(old, new):
    cfg = moved(
        old,
        new,
        inside='data/set/a.json',
        itself='data/set',
        folder='data/set/',
        beside='data/set_extra/a.json',
        weights='data/set.pth',
        deep=[dict(a=('data/set/b', 'x/data/set/b'))],
    )
    assert (
        cfg.inside == '/other/a.json'
        and cfg.itself in ('/other', '/other/')
        and cfg.folder == '/other/'
    )
    assert cfg.beside == 'data/set_extra/a.json' and cfg.weights == 'data/set.pth'
    assert cfg.deep[0].a == ('/other/b', 'x/data/set/b')


def test_data_root_moves_once():
    """Into itself, and where two keys share a dictionary; what is named beside it stays."""
    shared = dict(root='data/set/a')
    cfg = moved(
        'data/set/', 'data/set/v2/', 'kept=data/set/b', one=shared, two=shared, kept='data/set/c'
    )
    assert cfg.one.root == cfg.two.root == 'data/set/v2/a' and cfg.kept == 'data/set/b'


def test_an_empty_data_root_is_this_folder():
    assert moved('data/set/', '', file='data/set/a').file == 'a'
    assert moved('', '/other', file='a').file == 'a'


@pytest.mark.parametrize(
    'pair, said',
    [
        (
            'one.ann_file=["a.json","b.json"]',
            'takes one path.*several annotation files are several data sets',
        ),
        ('load_from=[a]', 'takes one path'),
        ('hooks.3.type=X', 'do not fit'),
        ('hooks.-1.type=X', 'do not fit'),
        ('data_root.x=1', 'do not fit'),
    ],
)
def test_options_that_fit_nothing(pair, said):
    cfg = Config(
        dict(data_root='data', one=dict(ann_file='a.json'), hooks=[dict(type='Y')], load_from=None)
    )
    with pytest.raises(UsageError, match=said):
        override(cfg, parse(pair), 'config')


def test_a_list_where_a_list_may_be():
    cfg = Config(dict(val_evaluator=dict(metric='bbox')))
    override(cfg, parse('val_evaluator.metric=bbox,segm'), 'config')
    assert cfg.val_evaluator.metric == ['bbox', 'segm']
