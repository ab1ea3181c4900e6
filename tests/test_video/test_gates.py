"""Each gate's formula on cases made by hand; learned gates on what can be learned."""

import math

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from conftest import SEED
from dynamicdet.errors import UsageError
from dynamicdet.video.gate_inputs import Evidence
from dynamicdet.video.gates import coin_entropy, detection_agreement, most_confident, name_of
from dynamicdet.video.learned_gates import cheapest_exits, goes_on, log_exits
from mmdet.registry import MODELS

LEFT, RIGHT = [0, 0, 10, 10], [50, 0, 60, 10]


def found(*detections):
    """Detections from (box, score, label)."""
    boxes, scores, labels = zip(*detections) if detections else ((), (), ())
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
    )


def at(exit, detections=None, earlier=None, pooled=(), change=None):
    return Evidence(exit, detections, earlier, list(pooled), change)


def build(name, **settings):
    return MODELS.build(dict(type=name, **settings))


def test_fixed_exit_stops_where_it_is_told():
    gate = build('FixedExit', exit=2)
    pooled = [torch.zeros(3, 4)]
    for exit, expected in enumerate([1, 1, 0, 0]):
        assert gate.difficulty(at(exit, pooled=pooled)).tolist() == [expected] * 3
    assert not gate.looks_at_detections and not gate.early
    for wrong in (-1, 1.5, True, 'last'):
        with pytest.raises(UsageError, match='whole number'):
            build('FixedExit', exit=wrong)


def test_entropy_of_a_coin():
    assert coin_entropy([0, 0.5, 1]).round(9).tolist() == [0, 1, 0]
    assert coin_entropy([0.25])[0] == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))


@pytest.mark.parametrize(
    'settings, expected',
    [
        (dict(kind='confidence'), 1 - 0.7),
        (dict(kind='confidence', over='sum'), 0.6 / 1.6),
        (dict(kind='entropy'), (1 + coin_entropy([0.9])[0]) / 2),
        (dict(kind='entropy', min_score=0.6), coin_entropy([0.9])[0]),
        (
            dict(kind='entropy', over='sum', min_score=0.3),
            (1 + coin_entropy([0.9])[0]) / (2 + coin_entropy([0.9])[0]),
        ),
    ],
)
def test_score_gate(settings, expected):
    # The third is below every least score.
    own = found((LEFT, 0.9, 0), (RIGHT, 0.5, 1), (RIGHT, 0.04, 1))
    assert build('ScoreGate', **settings).difficulty(at(0, [own])).tolist() == pytest.approx(
        [expected]
    )


def test_score_gate_where_nothing_is_found():
    nothing, weak = found(), found((LEFT, 0.01, 0))
    for settings, expected in (
        (dict(), 1),
        (dict(empty=0.25), 0.25),
        (dict(empty=0, over='sum'), 0),
    ):
        assert (
            build('ScoreGate', **settings).difficulty(at(1, [nothing, weak])).tolist()
            == [expected] * 2
        )


def test_score_gate_is_large_where_scores_are_in_doubt():
    sure, unsure = found((LEFT, 0.97, 0)), found((LEFT, 0.4, 0))
    for kind in ('entropy', 'confidence'):
        easy, hard = build('ScoreGate', kind=kind).difficulty(at(0, [sure, unsure])).tolist()
        assert 0 <= easy < hard <= 1


def test_bad_settings_are_said():
    for settings in (
        dict(kind='margin'),
        dict(over='median'),
        dict(min_score=1.2),
        dict(empty=-0.1),
    ):
        with pytest.raises(UsageError):
            build('ScoreGate', **settings)
    with pytest.raises(UsageError, match='iou'):
        build('AgreementGate', iou=1)
    with pytest.raises(UsageError, match='wraps'):
        build('TemporalGate', gate=dict(type='TemporalGate'))


def agree(one, other, **settings):
    gate = build('AgreementGate', **settings)
    return 1 - gate.difficulty(at(1, [one], [other])).item()


def test_agreement_of_the_same_and_of_nothing():
    both = found((LEFT, 0.9, 0), (RIGHT, 0.5, 1))
    assert agree(both, both) == pytest.approx(1)
    assert agree(found(), found()) == 1
    assert agree(both, found()) == 0 and agree(found(), both) == 0
    assert agree(found((LEFT, 0.01, 0)), found()) == 1


def test_agreement_by_hand():
    # Shifted by half: IoU 1/3. Other scores: the smaller counts. Another class: no pair.
    shifted = [5, 0, 15, 10]
    assert agree(found((LEFT, 0.8, 0)), found((shifted, 0.8, 0))) == pytest.approx(1 / 3)
    assert agree(found((LEFT, 0.8, 0)), found((LEFT, 0.4, 0))) == pytest.approx(2 * 0.4 / 1.2)
    assert agree(found((LEFT, 0.8, 0)), found((LEFT, 0.8, 1))) == 0
    assert agree(found((LEFT, 0.8, 0)), found((shifted, 0.8, 0)), iou=0.5) == 0


def test_agreement_pairs_greedily_and_once():
    # Both of one could pair with the one of the other; the better overlap does, and the rest stays
    # alone.
    near = [1, 0, 11, 10]
    assert agree(found((LEFT, 0.5, 0), (near, 0.5, 0)), found((LEFT, 0.5, 0))) == pytest.approx(
        2 * 0.5 / 1.5
    )


def test_agreement_is_symmetric_and_bounded():
    generator = np.random.default_rng(0)

    def draw():
        corner = generator.uniform(0, 20, (8, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(5, 20, (8, 2))], axis=1)
        (own,) = most_confident(
            [
                found(
                    *zip(
                        boxes.tolist(),
                        generator.uniform(0.1, 1, 8),
                        generator.integers(0, 2, 8).tolist(),
                    )
                )
            ]
        )
        return own

    for _ in range(20):
        one, other = draw(), draw()
        assert 0 < detection_agreement(one, other, 0.0) < 1
        assert detection_agreement(one, other, 0.0) == pytest.approx(
            detection_agreement(other, one, 0.0)
        )


def test_first_exit_has_none_to_agree_with():
    assert build('AgreementGate').difficulty(at(0, [found((LEFT, 0.9, 0))])).tolist() == [1]


def test_temporal_gate_goes_by_change_and_then_by_what_it_wraps():
    change = torch.tensor([0.0, 0.3, 1.0])
    alone = build('TemporalGate')
    assert alone.early and not alone.looks_at_detections
    assert alone.difficulty(at(-1, change=change)).tolist() == change.tolist()
    assert alone.difficulty(at(0, pooled=[torch.zeros(2, 4)])).tolist() == [1, 1]
    wrapping = build('TemporalGate', gate=dict(type='ScoreGate', kind='confidence'))
    assert wrapping.early and wrapping.looks_at_detections
    assert wrapping.difficulty(at(-1, change=change)).tolist() == change.tolist()
    assert wrapping.difficulty(at(0, [found((LEFT, 0.75, 0))])).tolist() == [0.25]


def test_temporal_gate_may_see_that_there_is_nothing():
    gate = build('TemporalGate', nothing=dict(type='Presence', in_channels=1))
    early = torch.stack([torch.full((64,), 1.0), torch.full((64,), -1.0), torch.full((64,), -1.0)])
    early[2, 9] = 1  # an object in one part is one in the frame
    change = torch.tensor([0.3, 0.3, 1.0])
    # Not fitted, it takes no frame for empty. Difficulty is the change in any case: the detector
    # puts both together.
    assert (
        gate.difficulty(at(-1, change=change)).tolist() == change.tolist()
        and not gate.sees_nothing(early).any()
    )
    torch.nn.init.zeros_(gate.nothing.hidden.weight)
    gate.nothing.hidden.weight[:, 0] = 1
    torch.nn.init.zeros_(gate.nothing.hidden.bias)
    torch.nn.init.ones_(gate.nothing.output.weight)
    torch.nn.init.zeros_(gate.nothing.output.bias)
    gate.nothing.level.fill_(0.5)
    assert gate.nothing(early).tolist() == pytest.approx([1, 0.5, 1], abs=1e-6)
    assert gate.sees_nothing(early).tolist() == [False, True, False]
    assert name_of(gate) == 'TemporalGate(Presence)'
    with pytest.raises(UsageError, match='early map of 1 channels, and this one has 2'):
        gate.sees_nothing(torch.zeros(1, 128))
    with pytest.raises(UsageError, match='from 1 on'):
        build('Presence', in_channels=0)


def test_rules_keep_the_order_of_images_and_their_number():
    many = [found((LEFT, score, 0)) for score in (0.9, 0.2, 0.6)]
    for gate in (build('ScoreGate', kind='confidence'), build('AgreementGate')):
        whole = gate.difficulty(at(1, many, many[::-1]))
        assert whole.dtype == torch.float32 and whole.shape == (3,)
        single = [
            gate.difficulty(at(1, many[i : i + 1], many[::-1][i : i + 1])).item() for i in range(3)
        ]
        assert whole.tolist() == pytest.approx(single)


# Learned gates.

CHANNELS = (4, 6, 5)


def features(images=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, generator=generator) for channels in CHANNELS]


@pytest.fixture(params=['HaltingGate', 'GumbelGate'])
def learned(request):
    torch.manual_seed(0)
    return build(request.param, in_channels=CHANNELS, width=8)


def disturb(gate):
    for layer in gate.go:
        torch.nn.init.normal_(layer.weight)
    return gate


def test_learned_gate_that_learned_nothing(learned):
    for exit in range(3):
        assert learned.difficulty(at(exit, pooled=features()[: exit + 1])).tolist() == [0.5] * 7


def test_learned_gate_at_one_exit_is_that_of_all(learned):
    pooled = features()
    logits = disturb(learned).logits(pooled)
    assert logits.shape == (3, 7) and logits.std() > 0.1
    for exit in range(3):
        own = learned.difficulty(at(exit, pooled=pooled[: exit + 1]))
        assert torch.equal(own, logits[exit].sigmoid())


def test_learned_gate_knows_nothing_of_later_layers(learned):
    pooled = features()
    changed = [*pooled[:2], pooled[2] + 1]
    before, after = disturb(learned).logits(pooled), learned.logits(changed)
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])


def test_learned_gate_sees_how_features_behave(learned):
    # The same features at the last exit, others on the way there.
    pooled = features()
    changed = [pooled[0] + 1, *pooled[1:]]
    assert not torch.allclose(disturb(learned).logits(pooled)[2], learned.logits(changed)[2])


def test_learned_gate_standardizes(learned):
    pooled = features()
    scaled = [1000 * x + 7 for x in pooled]
    disturb(learned).standardize(pooled)
    expected = learned.logits(pooled)
    learned.standardize(scaled)
    assert torch.allclose(learned.logits(scaled), expected, atol=1e-4)
    # What never changes must not divide by 0.
    learned.standardize([torch.ones_like(x) for x in pooled])
    assert learned.logits([torch.ones_like(x) for x in pooled]).isfinite().all()


def test_learned_gate_of_too_few_heads(learned):
    with pytest.raises(UsageError, match='3 heads'):
        learned.difficulty(at(3, pooled=[*features(), torch.zeros(7, 2)]))


def test_learned_gate_may_look_at_detections():
    gate = build('HaltingGate', in_channels=CHANNELS, width=8, looks_at_detections=True)
    disturb(gate)
    pooled = features(images=2)
    own = [found((LEFT, 0.9, 0)), found()]
    plain = gate.difficulty(at(0, own, None, pooled[:1]))
    other = gate.difficulty(at(0, [found((LEFT, 0.2, 0)), found()], None, pooled[:1]))
    assert plain[0] != other[0] and plain[1] == other[1]
    with pytest.raises(UsageError, match='record'):
        gate.logits(pooled)


def test_target_of_the_oracle():
    losses = torch.tensor([[1.0, 1.0, 0.2], [0.9, 0.1, 0.2], [0.0, 0.1, 0.2]])
    costs = torch.tensor([1.0, 2.0, 4.0])
    # Without a price the least loss, the first of equals; at a high price the cheapest.
    assert cheapest_exits(losses, costs, 0).tolist() == [2, 1, 0]
    assert cheapest_exits(losses, costs, 100).tolist() == [0, 0, 0]
    # 1 + 0.8 / 4, 0.9 + 1.6 / 4, 0 + 0.8: the last; 0.1 + 0.4: the middle.
    assert cheapest_exits(losses, costs, 0.8).tolist() == [2, 1, 0]
    assert goes_on(torch.tensor([2, 1, 0]), 3).tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    'kind, more', [('HaltingGate', dict(prices=[0.6])), ('GumbelGate', dict(cost_weight=0.6))]
)
def test_learned_gate_learns_the_exit_of_each_image(kind, more):
    # Images by turns need exit 0 (all are alike), 1 and 3, and the first layer shows it.
    need = torch.tensor([0, 1, 3] * 8)
    losses, costs = (torch.arange(4)[:, None] < need[None]).float(), torch.tensor([1.0, 2, 3, 4])
    pooled = features(images=len(need))
    pooled[0][:, :3] = 3.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 2] * 8))
    torch.manual_seed(SEED)
    gate = build(kind, in_channels=CHANNELS, width=16, **more)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.03)
    for _ in range(80):
        optimizer.zero_grad()
        found = gate.loss(pooled, losses, costs)
        sum(value for name, value in found.items() if 'loss' in name).backward()
        optimizer.step()
    goes = torch.cat([gate.logits(pooled) > 0, torch.zeros(1, len(need), dtype=torch.bool)])
    assert torch.equal((~goes).float().argmax(dim=0), need)


def test_exits_of_stick_breaking():
    go = torch.tensor([[0.0, 50.0], [0.0, -50.0], [0.0, 0.0]])
    found = log_exits(go).exp()
    assert found[:, 0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert found[:, 1].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-6)
    assert log_exits(100 * torch.randn(3, 50)).isfinite().all()


def test_gumbel_gate_draws_by_its_probabilities_and_is_straight_through():
    gate = build('GumbelGate', in_channels=CHANNELS, width=8, cost_weight=0)
    pooled, costs = features(images=4000), torch.tensor([1.0, 2, 3, 4])
    torch.manual_seed(0)
    # A gate that says 0.5: exits 0 to 3 with 1/2, 1/4, 1/8, 1/8.
    losses = torch.tensor([[1.0], [0], [0], [0]]).expand(4, 4000).clone().requires_grad_()
    found = gate.loss(pooled, losses, costs)
    assert found['loss_gate_task'].item() == pytest.approx(0.5, abs=0.03)
    assert found['gate_exit'].item() == pytest.approx(7 / 8, abs=0.06)
    assert found['loss_gate_cost'].item() == 0
    found['loss_gate_task'].backward()
    # One exit per image is what its loss flows to; the gate gets a gradient too.
    assert set(losses.grad.mul(4000).round().unique().tolist()) == {0, 1}
    assert losses.grad.sum(dim=0).mul(4000).round().eq(1).all()
    # Leaving at once is what costs.
    assert gate.go[0].bias.grad.item() < 0


def test_gumbel_gate_pays_for_compute():
    gate = build('GumbelGate', in_channels=CHANNELS, width=8, cost_weight=2.0)
    torch.manual_seed(0)
    found = gate.loss(features(images=2000), torch.zeros(4, 2000), torch.tensor([1.0, 2, 3, 4]))
    assert found['loss_gate_cost'].item() == pytest.approx(
        2 * (1 / 2 + 2 / 4 + 3 / 8 + 4 / 8) / 4, abs=0.03
    )
    found['loss_gate_cost'].backward()
    assert gate.go[0].bias.grad.item() > 0


def test_learned_gates_refuse_nonsense():
    for kind, settings in (
        ('HaltingGate', dict(in_channels=[])),
        ('HaltingGate', dict(in_channels=[3], prices=[])),
        ('HaltingGate', dict(in_channels=[3], prices=[0])),
        ('GumbelGate', dict(in_channels=[3], temperature=0)),
        ('GumbelGate', dict(in_channels=[3], cost_weight=-1)),
    ):
        with pytest.raises(UsageError):
            build(kind, **settings)


def test_half_precision_features_are_fine(learned):
    half = [x.half() for x in features()]
    own = disturb(learned).difficulty(at(2, pooled=half))
    assert own.dtype == torch.float32 and own.isfinite().all()
