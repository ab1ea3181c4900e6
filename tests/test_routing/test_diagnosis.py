import math

import pytest

from dynamicdet.errors import UsageError
from dynamicdet.routing.diagnosis import diagnose, interval_sign

UP, DOWN, OPEN = (2.0, 1.0, 3.0), (-2.0, -3.0, -1.0), (2.0, -1.0, 5.0)


def text(**figures):
    return ' '.join(diagnose(figures))


@pytest.mark.parametrize(
    'estimate, told',
    [
        (UP, 1),
        (DOWN, -1),
        (OPEN, 0),
        ((1, 0, 2), 0),
        ((-1, -2, 0), 0),
        (None, 0),
        ((1, None, None), 0),
        ((1, math.nan, 2), 0),
        ((None, 1, 2), 0),
    ],
)
def test_side(estimate, told):
    assert interval_sign(estimate) == told


def test_side_of_another_value():
    assert [interval_sign((0.5, 0.4, 0.6), of) for of in (0.3, 0.5, 0.7)] == [1, 0, -1]


def test_nothing_to_say():
    assert diagnose({}) == diagnose(dict(images=100, gap=None, strata=[], peers={})) == []


def test_wrong_input():
    with pytest.raises(UsageError, match='gains'):
        diagnose(dict(gains=UP))
    with pytest.raises(UsageError, match='value, low, high'):
        diagnose(dict(gap=(1, 2)))


def test_exits_are_listed():
    assert diagnose(dict(exits=[(42.44, 41, 44), (44.5, None, None)])) == [
        'AP, with 95 % intervals: exit 0 42.4 (41.0 to 44.0), exit 1 44.5 (no interval).'
    ]


#: Figures -> a part of a sentence, and of each advice.
CASES = [
    (dict(gap=UP), 'better than the first by 2.0 (1.0 to 3.0) AP', []),
    (dict(gap=DOWN), 'worse than the first, by 2.0 (1.0 to 3.0) AP', ['longer', 'resolution']),
    (
        dict(gap=OPEN),
        'Whether the exits differ in AP cannot be told',
        ['resolution', 'four times as many'],
    ),
    (dict(honest_gain=UP), 'not by luck', []),
    (dict(honest_gain=DOWN), 'a harm in the other', ['how the views are made']),
    (
        dict(honest_gain=OPEN),
        'benefit differs by image at all cannot be told',
        ['resolution', 'four times as many'],
    ),
    (
        dict(loss_shares=dict(train=(0.91, 0.89, 0.93), held_out=(0.68, 0.65, 0.71))),
        'remember',
        ['held-out part'],
    ),
    (
        dict(loss_shares=dict(train=(0.70, 0.66, 0.74), held_out=(0.68, 0.65, 0.71))),
        'cannot be told',
        [],
    ),
    (
        dict(loss_shares=dict(train=(0.91, None, None), held_out=(0.68, 0.65, 0.71))),
        'cannot be told',
        [],
    ),
    (dict(correlation=dict(val=UP)), 'goes with the benefit on val', []),
    (
        dict(correlation=dict(test=DOWN)),
        'goes against the benefit on test',
        ['counts what AP counts', 'held-out part'],
    ),
    (dict(correlation=dict(val=OPEN)), 'goes with the benefit cannot be told on val', []),
    (
        dict(correlation=dict(val=OPEN), honest_gain=UP),
        'cannot be told on val',
        ['counts what AP counts', 'held-out part'],
    ),
    (
        dict(correlation=dict(val=OPEN), honest_gain=DOWN),
        'cannot be told on val',
        ['how the views are made'],
    ),
    (
        dict(correlation=dict(val=UP, test=OPEN), images=500),
        'cannot be told on test',
        ['four times the 500'],
    ),
    (dict(router_gain=UP), 'worth 2.0 (1.0 to 3.0) AP over random', []),
    (
        dict(router_gain=UP, half_share=0.69),
        'At 69% hard, the nearest to half that ties allow, the router is worth',
        [],
    ),
    (
        dict(router_gain=DOWN),
        'costs 2.0 (1.0 to 3.0) AP',
        ['counts what AP counts', 'held-out part'],
    ),
    (dict(router_gain=OPEN), 'difference from random routing cannot be told', []),
    (
        dict(normalized_gain=(0.5, 0.3, 0.7)),
        'beats random routing at half hard: normalized gain 0.50 (0.30 to 0.70), more than the '
        "paper's",
        [],
    ),
    (dict(normalized_gain=(0.2, 0.1, 0.3)), "not clearly different from the paper's", []),
    (dict(normalized_gain=(0.1, 0.05, 0.15)), "less than the paper's", ['counts what AP counts']),
    (
        dict(normalized_gain=(-0.1, -0.15, -0.05)),
        'worse than random',
        ['counts what AP counts', 'held-out part'],
    ),
    (dict(normalized_gain=OPEN), 'beats random routing at half hard cannot be told', []),
    (dict(efficacy=(0.7, 0.6, 0.8)), 'more than half', []),
    (dict(efficacy=(0.5, 0.4, 0.6)), 'gets a part', []),
    (dict(efficacy=(0.2, 0.1, 0.3)), 'less than half', ['richer inputs']),
    (
        dict(efficacy=(-0.2, -0.3, -0.1)),
        'worse than chance',
        ['counts what AP counts', 'held-out part'],
    ),
    (dict(efficacy=OPEN), 'honest oracle gets cannot be told', ['four times as many']),
    (dict(spread=0.001), 'nearly all the same', ['standardized']),
    (dict(transfer=dict(asked=0.5, got=(0.6, 0.55, 0.65))), 'too many images', ['Calibrate']),
    (dict(transfer=dict(asked=0.5, got=(0.4, 0.35, 0.45))), 'too few images', ['Calibrate']),
    (
        dict(transfer=dict(asked=0.5, got=(0.4, 0.35, 0.45), calibrated=True)),
        'The calibrated threshold calls too few images hard',
        ['Calibrate'],
    ),
    (
        dict(transfer=dict(asked=0.5, got=(0.52, 0.48, 0.56), calibrated=True)),
        'The calibrated threshold gives a hard share of 0.52',
        [],
    ),
    (dict(transfer=dict(asked=0.5, got=(0.52, 0.48, 0.56))), 'a difference cannot be told', []),
    (dict(peers=dict(count=UP, entropy=(3, 2, 4))), "'entropy', by 3.0", ["Route by 'entropy'"]),
    (dict(peers=dict(count=OPEN)), 'cannot be told of any', []),
    (
        dict(
            strata=[
                dict(name='one object', gap=(0, -1, 1)),
                dict(name='many', gap=(8, 7, 9)),
                dict(name='few', gap=(3, 2, 4)),
            ]
        ),
        '8.0 (7.0 to 9.0) AP on many, 0.0 (-1.0 to 1.0) on one object',
        [],
    ),
    (
        dict(strata=[dict(name='easy', gap=(-28, -30, -26)), dict(name='hard', gap=(19, 17, 21))]),
        'does harm on easy',
        [],
    ),
    (
        dict(strata=[dict(name='easy', gap=(3.1, 1, 5)), dict(name='hard', gap=(2.0, 0, 4))]),
        'differs between the 2 strata cannot be told',
        ['resolution'],
    ),
]


#: How what is to be tried begins; no sentence on a figure does.
ADVISES = ('Try', 'Train', 'Measure', 'Calibrate', 'Look', 'Give', 'Route by', 'There is more')


@pytest.mark.parametrize('figures, sentence, advice', CASES, ids=lambda value: str(value)[:30])
def test_each_branch(figures, sentence, advice):
    """Nothing else is advised."""
    said = diagnose(figures)
    known = [one for one in said if not one.startswith(ADVISES)]
    assert any(sentence in one for one in known)
    hints = said[len(known) :]
    assert len(hints) == len(advice) and all(part in hint for part, hint in zip(advice, hints))


def test_exits_that_differ_by_resolution_are_not_told_to():
    figures = dict(gap=OPEN, honest_gain=OPEN, images=100)
    assert 'exits of different resolution' in text(**figures)
    # Where nothing is told, nothing speaks against the scale that there is.
    said = text(first_scale=0.5, **figures)
    assert 'different resolution' not in said and 'first_scale' not in said
    assert 'Measure on more images' in said
    strata = [dict(name='easy', gap=OPEN), dict(name='hard', gap=OPEN)]
    assert 'first_scale' not in text(first_scale=0.5, strata=strata)
    said = text(first_scale=0.5, gap=DOWN)
    assert 'different resolution' not in said and 'another first_scale than 0.5' in said


def test_without_intervals_nothing_is_called_unsure():
    said = text(honest_gain=(3.0, None, None), bootstrap=0)
    assert 'nothing sure' not in said and '--bootstrap' in said
    # The tables then have ratios as they are.
    assert 'not defined' not in text(gap=(3.0, None, None), bootstrap=0)
    assert 'not defined' in text(gap=OPEN)


def test_wide_enough_difficulties_are_not_spoken_of():
    assert diagnose(dict(spread=0.4)) == []


@pytest.mark.parametrize(
    'open_estimate', [OPEN, (2.0, None, None), (math.nan,) * 3, (0.0, 0.0, 0.0), (-0.1, -9.0, 0.0)]
)
def test_nothing_is_claimed_where_intervals_include_zero(open_estimate):
    figures = dict(
        gap=open_estimate,
        strata=[dict(name='easy', gap=open_estimate), dict(name='hard', gap=open_estimate)],
        honest_gain=open_estimate,
        loss_shares=dict(train=open_estimate, held_out=open_estimate),
        correlation=dict(val=open_estimate, test=open_estimate),
        router_gain=open_estimate,
        normalized_gain=open_estimate,
        efficacy=open_estimate,
        transfer=dict(asked=0.0, got=open_estimate),
        peers=dict(count=open_estimate),
    )
    for name, figure in figures.items():
        said = [
            sentence
            for sentence in diagnose({name: figure})
            if not sentence.startswith(('Try', 'Measure', 'Train', 'Calibrate'))
        ]
        assert said or name in ('strata', 'peers')
        assert all('cannot be told' in sentence for sentence in said)
    assert 'figure' not in text(**figures) and 'normalized gain 2' not in text(**figures)


def test_ratios_to_nothing_are_left_out():
    assert 'normalized gain 0.5' in text(gap=UP, normalized_gain=(0.5, 0.3, 0.7))
    for gap in (OPEN, DOWN):
        assert 'normalized gain 0.5' not in text(gap=gap, normalized_gain=(0.5, 0.3, 0.7))
    assert 'efficacy' in text(honest_gain=UP, efficacy=(0.7, 0.6, 0.8))
    for honest in (OPEN, DOWN):
        assert 'efficacy' not in text(honest_gain=honest, efficacy=(0.7, 0.6, 0.8))


def test_a_benefit_that_is_predicted_and_does_not_pay():
    said = text(gap=UP, correlation=dict(val=(0.39, 0.3, 0.5)), normalized_gain=(0.02, -0.1, 0.1))
    assert 'counts what AP counts' in said
    assert 'counts what AP counts' not in text(
        gap=UP, correlation=dict(val=OPEN), normalized_gain=OPEN
    )


def test_many_looks_need_more_to_tell():
    """Two intervals that just part tell; the same two among ten do not, nor does one peer of
    many."""
    pair = [dict(name='a', gap=(0, -1, 1)), dict(name='b', gap=(1.8, 0.8, 2.8))]
    assert 'on b' in text(strata=pair)
    others = [dict(name=str(index), gap=(0.9, -0.1, 1.9)) for index in range(8)]
    assert 'cannot be told' in text(strata=pair + others)
    lead = (1.0, 0.1, 1.9)
    assert "'a'" in text(peers=dict(a=lead))
    assert 'cannot be told' in text(
        peers=dict(a=lead, **{str(index): (0, -1, 1) for index in range(9)})
    )


def test_advice_comes_last_and_once():
    said = diagnose(
        dict(gap=OPEN, honest_gain=OPEN, efficacy=DOWN, correlation=dict(val=DOWN, test=DOWN))
    )
    assert len(said) == len(set(said))
    advises = [sentence.startswith(('Try', 'Train', 'Measure')) for sentence in said]
    assert any(advises) and advises == sorted(advises)


def test_the_issues_tables_read_as_the_issue_does():
    """Exits of equal resolution: a uniform benefit, remembered images; then exits of different
    resolution."""
    equal = text(
        images=1500,
        gap=(2.4, 1.5, 3.3),
        strata=[
            dict(name='the easy half', gap=(3.1, 1.9, 4.3)),
            dict(name='the rest', gap=(2.0, 0.2, 3.8)),
        ],
        honest_gain=(0.1, -0.2, 0.4),
        loss_shares=dict(train=(0.91, 0.89, 0.93), held_out=(0.68, 0.66, 0.70)),
        correlation=dict(val=(0.1, 0.05, 0.15)),
        normalized_gain=(-0.10, -0.19, -0.01),
    )
    for part in (
        'is better than',
        'the same everywhere',
        'remember',
        'worse than random',
        'resolution',
    ):
        assert part in equal
    different = text(
        images=1500,
        gap=(2.3, 1.0, 3.6),
        strata=[
            dict(name='the easy half', gap=(-27.8, -30, -25)),
            dict(name='the rest', gap=(19.1, 16, 22)),
        ],
        honest_gain=(7, 6, 8),
        correlation=dict(val=(0.67, 0.64, 0.7)),
        normalized_gain=(2.8, 1.5, 5.0),
        efficacy=(0.8, 0.7, 0.9),
    )
    for part in (
        'differs by kind',
        'harm on the easy half',
        'not by luck',
        'beats',
        'more than half',
    ):
        assert part in different
    assert 'Try' not in different
