"""After each validation the log says which exits its AP is of."""

from pathlib import Path

from conftest import load_small, load_small_router, train
from dynamicdet.engine.validation_exits_hook import describe_exits
from dynamicdet.testing import tiny_dynamic
from mmdet.registry import MODELS


def lines_of(runner):
    log = ''.join(path.read_text() for path in Path(runner.work_dir).glob('*/*.log'))
    return [line.split('INFO - ')[-1] for line in log.splitlines() if 'of this validation' in line]


def test_step_1_says_that_its_router_is_not_trained(digits, tmp_path):
    runner = train(
        load_small(
            'dy_faster_rcnn_digits',
            digits,
            tmp_path,
            val=True,
            **{
                'train_cfg.max_epochs': 1,
                'train_cfg.val_interval': 1,
                'model.budget': dict(threshold=-1.0),
            },
        )
    )
    assert lines_of(runner) == [
        'the AP of this validation is of exit 1 alone, by threshold -1, of a router that is not '
        'trained yet'
    ]


def test_step_2_does_not(digits, cascade, tmp_path):
    cfg = load_small_router(digits, tmp_path, cascade, val=True, **{'train_cfg.val_interval': 1})
    (line,) = lines_of(train(cfg))
    assert line.endswith(', by threshold 0.5')


def test_shares_of_a_mixture():
    model = MODELS.build(tiny_dynamic('fcos'))
    model.delta.fill_(0.1)
    assert describe_exits(model, [1, 0, 1, 1]) == (
        'the AP of this validation is of a mixture: 25.0% at exit 0, 75.0% at exit 1, by threshold '
        '0.5'
    )
    assert describe_exits(model, [0, 0]).endswith('is of exit 0 alone, by threshold 0.5')
