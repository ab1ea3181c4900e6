"""What the figures of a router mean, in plain sentences, and what to try next.

A figure with an interval, an *estimate*, is ``(value, low, high)``: 95 %, over resamples of the
images. What an interval does not settle is never claimed: the sentence then says that it cannot be
told. An estimate whose value or ends are None or NaN settles nothing.

`diagnose` takes a dictionary; what is not in it is not spoken of:

* ``images`` (int): number of images that were measured.
* ``first_scale``: how large exit 0 sees the image, as a share of its sides; 1, as the last exit,
  where left out.
* ``exits``: estimates of the AP of each exit, percent, the first first.
* ``gap``: estimate of AP(last) - AP(first), on paired resamples.
* ``strata``: per stratum ``dict(name, gap)``, the gap an estimate; strata of different images.
* ``honest_gain``: estimate of the AP that the honest oracle gains over random routing at the same
  hard share.
* ``correlation``: estimates of difficulty's rank correlation with benefit: ``dict(val, test)``, or
  either.
* ``router_gain``: estimate of the router's AP minus random routing's at half hard.
* ``half_share``: the hard share that this is at, a half but for ties; a half where it is left out.
* ``normalized_gain``: the same as a share of the gap, see `merit`; left out where the gap is not
  above 0.
* ``efficacy``: estimate, see `merit`.
* ``bootstrap``: how many resamples the intervals are from; at 0 there are none.
* ``loss_shares``: ``dict(train, held_out)``, estimates of the share of images with L1 > L2.
* ``spread``: 90 % range of the difficulties, from their 5 % to their 95 % quantile, in [0, 1].
* ``transfer``: ``dict(asked, got, calibrated)``: the hard share asked for; estimate of what the
  threshold serves; whether it is of a checkpoint's calibration, by default of a record of val.
* ``class_gain``: estimate of the AP at half hard of true gains by class minus that of true gains.
* ``baselines``: by ``gflops`` and ``latency``: estimate of how much more AP the router has, at half
  hard, than plain detectors at the same cost; None where none is as cheap.
* ``peers``: name -> estimate of how much more AP a peer has than the router at the same cost. No
  references.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from ..errors import UsageError

Estimate = Sequence[float | None]

#: Ends of a 95 % interval of a normal distribution, in standard deviations.
_NORMAL_95 = 1.96
#: A 90 % range of difficulties below this is next to nothing: thresholds then hang on the third
#: digit.
_NARROW = 0.02
#: A hard share this far from a half still is one.
_NEAR = 0.02
#: The paper's own normalized gain at 50 % hard (DynamicDet's table: 0.18, 0.22, 0.18).
_PAPERS_GAIN = 0.2

_RESOLUTION = 'Try exits of different resolution: there the benefit differs most by image.'
_COUNT = (
    'Try a target that counts what AP counts: the loss difference times the objects, or the '
    "images' "
    'difference of AP.'
)
_HELD_OUT = (
    'Train the router on images that the detectors were not trained on: a held-out part, or '
    'cross-fitting.'
)
_RICHER = (
    'There is more to find: try richer inputs of the router, such as maxima and spreads, or more '
    'images to train it on.'
)
_TRAIN = 'Train the last exit longer, or at the scale that it is used at.'
_VIEWS = 'Look at how the views are made: the detectors may never have been trained on such images.'
_STANDARDIZE = 'Give the router standardized features, and more steps.'
_BY_CLASS = 'Weigh gains by class: objective=dict(type=..., by_class=True).'
_PLAIN = 'Take a plain detector of a size between the exits: it finds more for as much.'
_CALIBRATE = (
    'Calibrate the threshold on images like those it will see, or let a budget controller hold the '
    'share.'
)
_MORE = 'Measure on more images'


def diagnose(figures: Mapping) -> list[str]:
    """Whether routing pays here, why or why not, and what to try.

    Args:
        figures (Mapping): See the top of this file.

    Returns:
        list[str]: Sentences: what the figures say, question by question, then what to try, each
            once.

    Raises:
        UsageError: If a key is unknown or an estimate is not of three numbers.
    """
    unknown = set(figures) - {'images', 'bootstrap', 'half_share', 'first_scale', *_QUESTIONS}
    if unknown:
        raise UsageError(f'the diagnosis knows no figure named {", ".join(sorted(unknown))}')
    findings, advice = [], []
    for name, question in _QUESTIONS.items():
        if figures.get(name) is not None:
            sentences, hints = question(figures)
            findings += sentences
            advice += hints
    return findings + list(dict.fromkeys(advice))


def _resolution(figures: Mapping, sign: int = 0) -> list[str]:
    """Advice to change the resolution of the exits, by what it is now. Where they differ in it
    already, what cannot be told (``sign`` 0) speaks neither for nor against another."""
    scale = figures.get('first_scale', 1.0)
    if scale == 1:
        return [_RESOLUTION]
    return [f'Try another first_scale than {scale:g}, which the exits have now.'] if sign else []


def interval_sign(estimate: Estimate | None, of: float = 0.0) -> int:
    """1 if the whole interval lies above ``of``, -1 if below, 0 if the data do not tell."""
    if estimate is None:
        return 0
    if len(estimate) != 3:
        raise UsageError(f'an estimate is (value, low, high), got {estimate}')
    if any(number is None or not math.isfinite(number) for number in estimate):
        return 0
    _, low, high = estimate
    return int(low > of) - int(high < of)


def _exits(figures: Mapping) -> tuple[list, list]:
    names = [f'exit {index} {_show(estimate)}' for index, estimate in enumerate(figures['exits'])]
    return [f'AP, with 95 % intervals: {", ".join(names)}.'], []


def _gap(figures: Mapping) -> tuple[list, list]:
    gap, sign = figures['gap'], interval_sign(figures['gap'])
    if sign > 0:
        return [f'The last exit is better than the first by {_show(gap)} AP.'], []
    if sign < 0:
        return [
            f'The last exit is worse than the first, by {_show(gap, sign=-1)} AP: it costs more '
            'and finds less.'
        ], [_TRAIN, *_resolution(figures, sign)]
    # Without intervals ratios are given as they are.
    rest = (
        ''
        if figures.get('bootstrap') == 0
        else ': a share of their difference, such as the normalized gain, is not defined'
    )
    return [f'Whether the exits differ in AP cannot be told ({_show(gap)}){rest}.'], [
        *_resolution(figures),
        _more(figures),
    ]


def _strata(figures: Mapping) -> tuple[list, list]:
    """Compare strata in pairs; the interval of a difference widens with the number of pairs
    (Bonferroni)."""
    strata = [stratum for stratum in figures['strata'] if _known(stratum['gap'])]
    pairs = list(combinations(strata, 2))
    if not pairs:
        return [], []
    harmed = [
        stratum['name']
        for stratum in strata
        if interval_sign(_widened(stratum['gap'], len(strata))) < 0
    ]
    harm = [f'The last exit does harm on {", ".join(harmed)}.'] if harmed else []
    differing = [pair for pair in pairs if _differ(pair[0]['gap'], pair[1]['gap'], len(pairs))]
    if not differing:
        return [
            f'Whether what the last exit adds differs between the {len(strata)} strata cannot be '
            'told: a benefit that is the same everywhere cannot be routed much better than at '
            'random.',
            *harm,
        ], _resolution(figures)
    first, second = max(differing, key=lambda pair: abs(pair[0]['gap'][0] - pair[1]['gap'][0]))
    most, least = (first, second) if first['gap'][0] > second['gap'][0] else (second, first)
    return [
        f'What the last exit adds differs by kind of image: {_show(most["gap"])} AP on '
        f'{most["name"]}, {_show(least["gap"])} on {least["name"]}.',
        *harm,
    ], []


def _honest_gain(figures: Mapping) -> tuple[list, list]:
    gain, sign = figures['honest_gain'], interval_sign(figures['honest_gain'])
    if sign > 0:
        return [
            'The benefit differs by image, and not by luck: exits chosen on another view are '
            f'worth {_show(gain)} AP over random routing.'
        ], []
    if sign < 0:
        return [
            f'An oracle that saw another view of each image loses {_show(gain, sign=-1)} AP '
            'against random routing: what looks like a benefit in one view is a harm in the other.'
        ], [_VIEWS]
    unsure = (
        'Without intervals it'
        if figures.get('bootstrap') == 0
        else 'Whether the benefit differs by image at all'
    )
    rest = '' if figures.get('bootstrap') == 0 else ' A router has nothing sure to learn.'
    return [
        f'{unsure} cannot be told: an oracle that saw another view of each image has {_show(gain)} '
        f'AP over random routing.{rest}'
    ], [*_resolution(figures), _more(figures)]


def _loss_shares(figures: Mapping) -> tuple[list, list]:
    train, held_out = figures['loss_shares']['train'], figures['loss_shares']['held_out']
    shares = (
        f'a share of {_show(train, 2)} of training images and {_show(held_out, 2)} of held-out ones'
    )
    if not _differ(train, held_out):
        return [f'L1 > L2 on {shares}: a difference cannot be told.'], []
    return [
        f'The detectors remember their training images: L1 > L2 on {shares}. Loss differences '
        'there say little about new images.'
    ], [_HELD_OUT]


def _correlation(figures: Mapping) -> tuple[list, list]:
    parts = {
        name: estimate for name, estimate in figures['correlation'].items() if estimate is not None
    }
    sentences, hints = [], []
    for name, estimate in parts.items():
        sign = interval_sign(estimate)
        finding = {
            1: 'Difficulty goes with the benefit',
            -1: 'Difficulty goes against the benefit',
            0: 'Whether difficulty goes with the benefit cannot be told',
        }[sign]
        sentences.append(f'{finding} on {name} (rank correlation {_show(estimate, 2)}).')
        # Where nothing is known to differ by image there is nothing to find, and no target helps.
        if sign < 0 or (sign == 0 and interval_sign(figures.get('honest_gain')) > 0):
            hints += [_COUNT, _HELD_OUT]
    if (
        'test' in parts
        and interval_sign(parts.get('val')) > 0
        and interval_sign(parts['test']) == 0
    ):
        hints.append(_more(figures))
    return sentences, hints


def _router_gain(figures: Mapping) -> tuple[list, list]:
    gain, sign = figures['router_gain'], interval_sign(figures['router_gain'])
    share = figures.get('half_share', 0.5)
    # Equal difficulties are not parted.
    at = (
        'At half hard'
        if abs(share - 0.5) <= _NEAR
        else f'At {share:.0%} hard, the nearest to half that ties allow,'
    )
    finding = {
        1: f'{at} the router is worth {_show(gain)} AP over random routing.',
        -1: f'{at} the router costs {_show(gain, sign=-1)} AP against random routing.',
        0: f'{at} a difference from random routing cannot be told ({_show(gain)} AP).',
    }[sign]
    return [finding], [_COUNT, _HELD_OUT] if sign < 0 else []


def _normalized_gain(figures: Mapping) -> tuple[list, list]:
    gain, sign = figures['normalized_gain'], interval_sign(figures['normalized_gain'])
    if 'gap' in figures and interval_sign(figures['gap']) <= 0:
        return [], []  # a ratio to what may be 0, or of turned sign
    shown = f'normalized gain {_show(gain, 2)}'
    if sign > 0:
        size = {1: 'more than', -1: 'less than', 0: 'not clearly different from'}[
            interval_sign(gain, _PAPERS_GAIN)
        ]
        return [
            f"The router beats random routing at half hard: {shown}, {size} the paper's "
            f'{_PAPERS_GAIN:g}.'
        ], [_COUNT] if size == 'less than' else []
    if sign < 0:
        return [f'The router is worse than random routing at half hard: {shown}.'], [
            _COUNT,
            _HELD_OUT,
        ]
    # It predicts something, but not what AP counts.
    finds = any(interval_sign(estimate) > 0 for estimate in figures.get('correlation', {}).values())
    return [f'Whether the router beats random routing at half hard cannot be told: {shown}.'], [
        _COUNT
    ] if finds else []


def _efficacy(figures: Mapping) -> tuple[list, list]:
    efficacy, sign = figures['efficacy'], interval_sign(figures['efficacy'])
    if 'honest_gain' in figures and interval_sign(figures['honest_gain']) <= 0:
        return [], []  # a share of what may be nothing
    shown = f'efficacy {_show(efficacy, 2)}'
    if sign < 0:
        return [f'Over all hard shares the router does worse than chance: {shown}.'], [
            _COUNT,
            _HELD_OUT,
        ]
    if not sign:
        return [
            f'Whether the router gets any of what the honest oracle gets cannot be told: {shown}.'
        ], [_more(figures)]
    part = {1: 'more than half', -1: 'less than half', 0: 'a part'}[interval_sign(efficacy, 0.5)]
    return [
        f'Over all hard shares the router gets {part} of what the honest oracle gets: {shown}.'
    ], [_RICHER] if part == 'less than half' else []


def _spread(figures: Mapping) -> tuple[list, list]:
    spread = figures['spread']
    if spread >= _NARROW:
        return [], []
    return [
        f'The difficulties are nearly all the same (90 % of them within {spread:.2g}): small '
        'changes of the input move an image across a threshold.'
    ], [_STANDARDIZE]


def _transfer(figures: Mapping) -> tuple[list, list]:
    asked, got = figures['transfer']['asked'], figures['transfer']['got']
    calibrated = figures['transfer'].get('calibrated', False)
    threshold = 'calibrated threshold' if calibrated else 'threshold of val'
    sign = interval_sign(got, asked)
    shares = f'a hard share of {_show(got, 2)} where {asked:g} was asked for'
    if not sign:
        return [f'The {threshold} gives {shares}: a difference cannot be told.'], []
    return [f'The {threshold} calls too {"many" if sign > 0 else "few"} images hard: {shares}.'], [
        _CALIBRATE
    ]


def _peers(figures: Mapping) -> tuple[list, list]:
    """The interval of each peer's lead widens with the number of peers (Bonferroni)."""
    leads = {name: lead for name, lead in figures['peers'].items() if _known(lead)}
    ahead = {
        name: lead for name, lead in leads.items() if interval_sign(_widened(lead, len(leads))) > 0
    }
    if not leads:
        return [], []
    if not ahead:
        return ['That a peer is better than the router at the same cost cannot be told of any.'], []
    best = max(ahead, key=lambda name: ahead[name][0])
    return [
        f"A simpler router is better at the same cost: '{best}', by {_show(ahead[best])} AP."
    ], [f"Route by '{best}', or give the router what it sees."]


def _class_gain(figures: Mapping) -> tuple[list, list]:
    gain, told = figures['class_gain'], interval_sign(figures['class_gain'])
    if told <= 0:
        return [], []
    return [
        f'Classes matter here: true gains by class are worth {_show(gain)} AP more than true gains.'
    ], [_BY_CLASS]


_AT_EQUAL = dict(gflops='GFLOPs', latency='milliseconds')


def _baselines(figures: Mapping) -> tuple[list, list]:
    sentences, hints = [], []
    for cost, words in _AT_EQUAL.items():
        lead = figures['baselines'].get(cost)
        if lead is None:
            sentences.append(
                f'No plain detector is as cheap as the router at half hard, by {words}.'
            )
            continue
        told = interval_sign(lead)
        said = {
            1: f'has {_show(lead)} AP more than plain detectors',
            -1: f'has {_show(lead, sign=-1)} AP less than plain detectors',
            0: f'cannot be told from plain detectors ({_show(lead)} AP)',
        }[told]
        sentences.append(f'At half hard the router {said} at equal {words}.')
        hints += [_PLAIN] * (told < 0)
    return sentences, hints


#: In the order in which they are asked: do exits differ, does the benefit, is it found, does it
#: hold?
_QUESTIONS = dict(
    exits=_exits,
    gap=_gap,
    strata=_strata,
    honest_gain=_honest_gain,
    loss_shares=_loss_shares,
    correlation=_correlation,
    router_gain=_router_gain,
    normalized_gain=_normalized_gain,
    efficacy=_efficacy,
    spread=_spread,
    transfer=_transfer,
    peers=_peers,
    class_gain=_class_gain,
    baselines=_baselines,
)


def _known(estimate: Estimate | None) -> bool:
    """Whether an estimate has its three numbers."""
    return estimate is not None and all(
        number is not None and math.isfinite(number) for number in estimate
    )


def _differ(first: Estimate, second: Estimate, comparisons: int = 1) -> bool:
    """Whether two estimates on different images differ beyond chance, as one of so many
    comparisons."""
    if not (_known(first) and _known(second)):
        return False
    half = math.hypot(*((high - low) / 2 for _, low, high in (first, second)))
    difference = first[0] - second[0]
    return (
        interval_sign(_widened((difference, difference - half, difference + half), comparisons))
        != 0
    )


def _widened(estimate: Estimate, comparisons: int) -> Estimate:
    """A 95 % interval made one of 1 - 5 % / comparisons, its sides as of normal distributions."""
    from scipy.stats import norm

    value, low, high = estimate
    factor = max(1.0, norm.ppf(1 - 0.025 / comparisons) / _NORMAL_95)
    return value, value - factor * (value - low), value + factor * (high - value)


def _more(figures: Mapping) -> str:
    """Intervals shrink with the root of the number of images."""
    images = figures.get('images')
    if figures.get('bootstrap') == 0:
        return 'Ask for intervals, by --bootstrap 200: without them nothing can be told apart.'
    return (
        f'{_MORE}: four times the {images} halve the intervals.'
        if images
        else (f'{_MORE}: four times as many halve the intervals.')
    )


def _show(estimate: Estimate | None, digits: int = 1, sign: int = 1) -> str:
    """The value with its interval; ``sign`` -1 turns it round."""
    if estimate is None or estimate[0] is None or not math.isfinite(estimate[0]):
        return 'unknown'
    value, *ends = estimate
    shown = f'{sign * value:.{digits}f}'
    if not _known(estimate):
        return f'{shown} (no interval)'
    low, high = sorted(sign * end for end in ends)
    return f'{shown} ({low:.{digits}f} to {high:.{digits}f})'
