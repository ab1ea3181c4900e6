import numpy as np
import pytest
import torch

from dynamicdet.errors import UsageError
from dynamicdet.routing import (
    OBJECTIVES,
    build_objective,
    class_aps,
    image_aps,
    offset_of,
    quantiles_of,
    ranks_of,
)

#: 0, 1, ... 100: each percent is its own quantile.
PERCENT = torch.arange(101.0)


def logits_of(phi):
    return torch.tensor(phi, dtype=torch.float64).logit().float().requires_grad_()


def gradient(objective, logits, gains, quantiles=PERCENT):
    """Of the loss times the number of images, in each image's logit."""
    logits = torch.as_tensor(logits, dtype=torch.float32).detach().requires_grad_()
    gains = torch.tensor(gains, requires_grad=True)
    build_objective(objective).loss(logits, gains, quantiles).backward()
    assert gains.grad is None
    return logits.grad * len(logits)


# What the gain is.


def test_gains_by_hand():
    """Three exits, two images; the middle exit does not matter."""
    values = torch.tensor([[3.0, 2.0], [99.0, 99.0], [1.0, 2.5]])
    gains = {
        name: build_objective(dict(type='rank', gain=name)).gains(values, [4, 0])
        for name in ('loss', 'loss_sum', 'ap')
    }
    assert gains['loss'].tolist() == [2.0, -0.5]
    assert gains['loss_sum'].tolist() == [8.0, 0.0]
    assert gains['ap'].tolist() == [-2.0, 0.5]


def boxes(*rows, scores=None):
    """Rows of x1, y1, x2, y2, label."""
    rows = np.array(rows, float).reshape(-1, 5)
    found = dict(
        bboxes=rows[:, :4], labels=rows[:, 4].astype(int), crowds=np.zeros(len(rows), bool)
    )
    return dict(found, scores=np.array(scores)) if scores is not None else found


def test_image_aps_by_hand():
    """Image 0 has two objects of two classes, image 1 one that nobody finds, image 2 none."""
    a, b = (0, 0, 40, 40, 3), (50, 50, 90, 90, 5)
    truths = [boxes(a, b), boxes(a), boxes()]
    nothing = boxes(scores=[])
    # The second is 3/4 of what it should be, which passes 0.5, 0.55, ... 0.75: 6 thresholds of 10.
    smaller = (50, 50, 90, 80, 5)
    first = [boxes(a, smaller, scores=[0.9, 0.8]), nothing, boxes(a, scores=[0.7])]
    # A surer wrong box before the right one halves the precision at all recalls.
    second = [
        boxes(a, b, (100, 0, 120, 20, 5), scores=[0.9, 0.3, 0.8]),
        boxes(b, scores=[0.9]),
        nothing,
    ]
    got = image_aps([first, second], [truths, truths])
    np.testing.assert_allclose(got, [[80, 0, 0], [75, 0, 0]], atol=1e-4)


def test_class_aps_by_hand():
    """The two images' AP by class, times the objects of the class in the image; a label that no
    image has is 0."""
    a, b = (0, 0, 40, 40, 3), (50, 50, 90, 90, 5)
    truths = [boxes(a, b), boxes(a, (0, 50, 40, 90, 3)), boxes()]
    first = [boxes(a, b, scores=[0.9, 0.8]), boxes(a, scores=[0.9]), boxes(a, scores=[0.7])]
    got = class_aps([first, [boxes(scores=[])] * 3], [truths, truths], 7)
    assert got.shape == (2, 3, 7)
    # One of two objects: recalls 0, 0.01, ... 0.5 of 101 are reached.
    expected = np.zeros((2, 3, 7))
    expected[0, 0, [3, 5]], expected[0, 1, 3] = 100, 2 * 100 * 51 / 101
    np.testing.assert_allclose(got, expected, atol=1e-4)
    nothing = [boxes(), boxes()]
    assert not class_aps([first[:2]] * 2, [nothing, nothing], 7).any()


def test_image_aps_are_free_of_scale_and_crowds():
    a, b = (0, 0, 40, 40, 3), (50, 50, 90, 90, 5)
    crowd = dict(boxes(a, b), crowds=np.array([False, True]))
    half = {name: value / 2 if name == 'bboxes' else value for name, value in crowd.items()}
    found = boxes(a, b, scores=[0.1, 0.9])
    small = {name: value / 2 if name == 'bboxes' else value for name, value in found.items()}
    np.testing.assert_allclose(image_aps([[found], [small]], [[crowd], [half]]), [[100], [100]])
    # Nothing but crowds: nothing to find.
    only = dict(boxes(b), crowds=np.array([True]))
    assert image_aps([[found]], [[only]]).tolist() == [[0]]


# How phi is fit to it.


def test_papers_gradient_is_minus_the_gain_plus_delta():
    """d/dphi = L2 - L1 + delta; the quantiles' median is 50; dphi/dz = phi (1 - phi)."""
    phi = torch.tensor([0.2, 0.9])
    got = gradient('paper', phi.logit(), [70.0, 10.0])
    torch.testing.assert_close(got, torch.tensor([-70 + 50.0, -10 + 50.0]) * phi * (1 - phi))


@pytest.mark.parametrize(
    'objective, offset',
    [
        ('no_offset', 0.0),
        (dict(type='cost_weight', offset=3.5), 3.5),
        ('paper', 50.0),
        (dict(type='paper', share=0.1), 90.0),
        (dict(type='loss_sum', share=1.0), 0.0),
    ],
)
def test_offsets(objective, offset):
    """Below it an image is pushed to the first exit, above it to the last."""
    assert offset_of(build_objective(objective), PERCENT).item() == pytest.approx(offset)
    down, up = gradient(objective, [0.0, 0.0], [offset - 1, offset + 1])
    assert down == -up > 0


def test_the_median_pushes_half_of_the_images_each_way():
    gains = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    got = gradient('paper', torch.zeros(1001), gains.tolist(), quantiles_of(gains))
    assert (got > 0).sum() == (got < 0).sum() == 500


def test_quantiles():
    quantiles = quantiles_of([5.0, -1.0, 1.0])
    assert quantiles.shape == (101,) and quantiles.dtype == torch.float32
    assert quantiles[[0, 25, 50, 75, 100]].tolist() == [-1, 0, 1, 3, 5]
    assert quantiles_of([2.0]).tolist() == [2] * 101


def test_ranks_are_uniform_over_the_training_set():
    """Whatever the gains' distribution: here log-normal, with a long tail."""
    gains = torch.randn(1001, generator=torch.Generator().manual_seed(0)).exp()
    ranks = ranks_of(gains, quantiles_of(gains))
    # Between two quantiles it is a line, so a percent is what can be missed.
    assert ranks.sort().values.sub(torch.linspace(0, 1, 1001)).abs().max() < 0.01
    assert (ranks[gains.argsort()].diff() >= 0).all()


def test_ranks_by_hand():
    got = ranks_of(torch.tensor([-5.0, 0.0, 12.5, 100.0, 1e9]), PERCENT)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.125, 1.0, 1.0]))


def test_equal_gains_share_the_middle_rank():
    """Half of the images gain nothing, a quarter lose 1, a quarter gain 1."""
    gains = torch.tensor([-1.0] * 250 + [0.0] * 500 + [1.0] * 250)
    ranks = ranks_of(torch.tensor([-1.0, 0.0, 1.0]), quantiles_of(gains))
    torch.testing.assert_close(ranks, torch.tensor([0.125, 0.5, 0.875]), atol=0.006, rtol=0)
    assert ranks_of(torch.zeros(1), torch.zeros(101)).item() == 0.5


def test_rank_by_hand():
    """phi = 0.5, ranks 0.25 and 1: cross entropy has gradient phi - rank in z, the squared error
    2 (phi - rank) phi (1 - phi)."""
    torch.testing.assert_close(
        gradient('rank', [0.0, 0.0], [25.0, 100.0]), torch.tensor([0.25, -0.5])
    )
    squared = gradient(dict(type='rank', error='squared'), [0.0, 0.0], [25.0, 100.0])
    torch.testing.assert_close(squared, torch.tensor([0.125, -0.25]))


def test_pairwise_by_hand():
    """Pairs (1, 0), (2, 0), (2, 1) with gains 1, 4, 3 apart; all logits 0: softplus(0) = log 2, and
    each pair pulls with 1/2 of its weight, here 1/8, 4/8, 3/8."""
    objective, gains = build_objective('pairwise'), torch.tensor([0.0, 1.0, 4.0])
    assert objective.loss(torch.zeros(3), gains, PERCENT).item() == pytest.approx(np.log(2))
    got = gradient('pairwise', [0.0, 0.0, 0.0], gains.tolist()) / 3
    torch.testing.assert_close(got, torch.tensor([5.0, 3 - 1.0, -7.0]) / 16)
    plain = gradient(dict(type='pairwise', weighted=False), [0.0, 0.0, 0.0], gains.tolist()) / 3
    torch.testing.assert_close(plain, torch.tensor([2.0, 0.0, -2.0]) / 6)


def test_pairwise_looks_at_the_order_alone():
    gains = [3.0, -1.0, 0.5]
    right = torch.tensor([40.0, -40.0, 0.0])
    assert gradient('pairwise', right, gains).abs().max() < 1e-6
    assert gradient('pairwise', -right, gains).abs().max() > 0.1
    # The level of the logits is left free.
    torch.testing.assert_close(
        gradient('pairwise', right / 40 + 7, gains),
        gradient('pairwise', right / 40, gains),
        atol=1e-5,
        rtol=1e-4,
    )
    # One image, or equal gains: nothing to learn, and no NaN.
    assert gradient('pairwise', [0.3], [1.0]).tolist() == [0]
    assert gradient('pairwise', [0.3, 0.1], [1.0, 1.0]).tolist() == [0, 0]


def test_regression_by_hand():
    """Quantiles 1 to 99 of 0..100 have the spread sqrt((99^2 - 1) / 12); the offset is 50."""
    spread = ((99**2 - 1) / 12) ** 0.5
    got = gradient('gain', [0.0, 0.0], [60.0, 1000.0])
    torch.testing.assert_close(got, -2 * torch.tensor([10.0, 49.0]) / spread)
    # At the target nothing pulls; the unit of the gain does not matter.
    right = torch.tensor([10.0 / spread])
    assert gradient('gain', right, [60.0]).abs().item() < 1e-6
    assert gradient('gain', right, [600.0], 10 * PERCENT).abs().item() < 1e-6
    # Gains that are all the same are no reason to divide by zero.
    assert gradient('gain', [0.0], [2.0], torch.full((101,), 2.0)).tolist() == [0]


@pytest.mark.parametrize('name', OBJECTIVES)
def test_each_objective_ranks_by_gain_when_it_is_minimized(name):
    """Free logits, from a bad start."""
    objective = build_objective(dict(type=name, offset=0.1) if name == 'cost_weight' else name)
    gains = torch.linspace(-1, 2, 31)
    logits = (-gains / 4).requires_grad_()
    quantiles, optimizer = quantiles_of(gains), torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        objective.loss(logits, gains, quantiles).backward()
        optimizer.step()
    if objective.fit == 'linear':
        # All that is above the offset goes to 1, all below it to 0: no order within a side.
        assert torch.equal(logits > 0, gains > offset_of(objective, quantiles))
        return
    assert np.corrcoef(logits.detach().argsort().argsort(), np.arange(31))[0, 1] > 0.99
    sides = (logits > 0) == (gains > offset_of(objective, quantiles))
    assert objective.fit == 'pairwise' or sides.float().mean() > 0.9


def test_half_precision_is_not_asked_to_hold_gains():
    with torch.autocast('cpu', torch.bfloat16):
        for name in ('paper', 'rank', 'pairwise', 'gain'):
            loss = build_objective(name).loss(torch.zeros(2), torch.tensor([70.0, 70.01]), PERCENT)
            assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    'config, said',
    [
        ('none', "objective must be one of paper, .*; got 'none'"),
        (dict(gain='loss'), "got 'None'"),
        ('cost_weight', 'needs its lambda'),
        (dict(type='rank', power=2), "'rank' has no setting power"),
        (
            dict(type='rank', gain='iou'),
            "gain must be one of loss, loss_sum, ap, reward; got 'iou'",
        ),
        (dict(type='rank', fit='tree'), 'fit must be one of'),
        (dict(type='rank', error='hinge'), 'error must be one of bce, squared'),
        (dict(type='paper', share=1.5), 'share must be in'),
    ],
)
def test_what_is_refused(config, said):
    with pytest.raises(UsageError, match=said):
        build_objective(config)


def test_a_config_composes():
    objective = build_objective(dict(type='pairwise', gain='ap', weighted=False))
    assert (objective.gain, objective.fit, objective.weighted) == ('ap', 'pairwise', False)
    assert build_objective(objective) is objective
