"""Tables of rules: names, values, and what no row knows."""

import pytest
import torch

from dynamicdet.errors import UsageError
from dynamicdet.exchange.rules import apply_rules, rename, skip


def names(rules, *keys):
    found, skipped = apply_rules(rules, {key: torch.zeros(2) for key in keys})
    return set(found), dict(skipped)


def test_names():
    rules = [
        skip(r'.*\.spare', 'spare'),
        rename(r'stem\.(\w+)', 'conv1.<1>', 'second.conv1.<1>'),
        rename(r'res(\d)\.(\d+)\.(.*)', 'layer<1-1>.<2>.<3+0>'),
        rename(r'head\..*', '<0>'),
        rename(r'.*\.again', 'never'),
    ]
    assert names(rules, 'stem.weight', 'res5.12.07', 'head.again', 'a.spare', 'head.spare') == (
        {'conv1.weight', 'second.conv1.weight', 'layer4.12.7', 'head.again'},
        {'spare': 2},
    )


def test_values():
    value = torch.arange(6.0).view(6, 1)
    rules = [
        rename('both', 'split.0', 'split.1', change=lambda values: values.split([2, 4])),
        rename('same', 'same.0', 'same.1', change=torch.neg),
    ]
    found, _ = apply_rules(rules, dict(both=value, same=value))
    assert torch.equal(found['split.0'], value[:2]) and torch.equal(found['split.1'], value[2:])
    assert torch.equal(found['same.0'], -value) and torch.equal(found['same.1'], -value)


@pytest.mark.parametrize(
    'keys, said',
    [
        (['a', 'bb', 'cc', 'dd', 'ee'], r"4 of its 5 entries are unknown .*'bb', 'cc', 'dd'\)"),
        (['a', 'prefix.a', 'aa'], 'unknown'),
        (['a', 'x'], "a second entry gives 'ours': 'x'"),
        (['split'], r"the entry 'split' has the shape \(2,\)"),
    ],
)
def test_refusals(keys, said):
    rules = [rename('a|x', 'ours'), rename('split', 's', 't', change=lambda v: v.split([1, 3]))]
    with pytest.raises(UsageError, match=said):
        names(rules, *keys)
