"""Which weights go: hand-made cases, torch's own choices, limits and refusals."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from dynamicdet.compression.pruning import (
    apply_masks,
    empty_layers,
    layers_of_blocks,
    pack_mask,
    prune_block,
    prune_weights,
    pruned_share,
    share_at,
    unpack_mask,
)
from dynamicdet.compression.pruning_blocks import (
    PruningBlock,
    find_layers,
    matches_patterns,
    selected_layers,
)
from dynamicdet.compression.scores import Statistics, activation_scores
from dynamicdet.errors import UsageError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6, 5)
    )


def every(**settings):
    return PruningBlock(**{'name': 'all', 'modules': ['*'], 'target': 0.5, **settings})


def zeros(module):
    return int((module.weight == 0).sum())


# What is in a block.


@pytest.mark.parametrize(
    'pattern, names',
    [
        ('backbone', ['backbone.a', 'backbone.b.c']),
        ('back*', ['backbone.a', 'backbone.b.c']),
        ('backbone.b', ['backbone.b.c']),
        ('*.c', ['backbone.b.c']),
        ('back', []),
        ('*.neck', ['one.neck.d']),
    ],
)
def test_a_pattern_takes_what_is_below(pattern, names):
    every = ['backbone.a', 'backbone.b.c', 'one.neck.d']
    assert [name for name in every if matches_patterns(name, [pattern])] == names


def test_layers_are_convolutions_and_linear_layers_in_order():
    assert list(find_layers(net())) == ['0', '2', '4']
    assert list(selected_layers(net(), every(exclude=['2']))) == ['0', '4']


# Who goes.


def test_the_smallest_of_the_block_go_as_torch_chooses_them():
    model, theirs = net(), net()
    layers = [theirs[0], theirs[2], theirs[4]]
    torch_prune.global_unstructured(
        [(layer, 'weight') for layer in layers], torch_prune.L1Unstructured, amount=0.5
    )
    masks = prune_weights(model, [every()])
    for name, layer in zip(('0', '2', '4'), layers):
        assert torch.equal(masks[name], layer.weight_mask.bool())
        assert torch.equal(model[int(name)].weight, layer.weight)
    # No key is new, and 126 weights were 72 + 24 + 30.
    assert model.state_dict().keys() == net().state_dict().keys()
    assert pruned_share(masks) == 63 / 126


def test_each_layer_by_itself_as_torch_chooses():
    model, theirs = net(), net()
    prune_weights(model, [every(over='layer', target=0.25)])
    for index in (0, 2, 4):
        torch_prune.l1_unstructured(theirs[index], 'weight', amount=0.25)
        assert torch.equal(model[index].weight, theirs[index].weight)


def test_channels_by_their_norm_as_torch_chooses():
    model, theirs = net(), net()
    prune_weights(model, [every(over='layer', structured=True)])
    for index in (0, 2, 4):
        torch_prune.ln_structured(theirs[index], 'weight', amount=0.5, n=2, dim=0)
        assert torch.equal(model[index].weight, theirs[index].weight)


def test_layers_of_a_kind_compete_with_each_other():
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
        model[0].weight.fill_(9)
    masks = prune_weights(model, [every(over='kind', target=0.25)])
    # 24 of the 96 weights of the convolutions, the smaller of which has just 24; the linear layer
    # loses its own.
    assert (zeros(model[0]), zeros(model[2]), zeros(model[4])) == (0, 24, 8) and empty_layers(
        masks
    ) == ['2']


def test_channels_of_a_block_compete_by_their_mean():
    """All weights of a layer are equal: 1 to 4 in the first, 2.5 in the second, whose channels are
    smaller."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 2, 3, 3))
        model[1].weight.fill_(2.5)
    prune_weights(model, [every(structured=True, target=0.25)])
    assert [int(channel.any()) for channel in model[0].weight] == [0, 0, 1, 1] and zeros(
        model[1]
    ) == 0


def test_every_layer_keeps_a_channel():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    masks = prune_weights(model, [every(structured=True, target=0.5)])
    assert not empty_layers(masks) and int(masks['1'].flatten(1).any(1).sum()) == 1


def test_channels_of_a_transposed_convolution_are_in_its_second_dimension():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight[:, 2] = 0.5
    mask = prune_weights(model, [every(structured=True, target=0.25)])['0']
    assert not mask[:, 2].any() and mask.sum() == mask.numel() * 3 / 4


@pytest.mark.parametrize('structured', [False, True])
def test_random_masks_hang_on_the_seed_and_are_nested(structured):
    block = every(score='random', structured=structured, over='layer')
    layers = selected_layers(net(), block)
    state = torch.random.get_rng_state()
    little, more, again, other = (
        prune_block(layers, block, share, seed=seed)
        for share, seed in ((0.2, 1), (0.6, 1), (0.6, 1), (0.6, 2))
    )
    assert torch.equal(state, torch.random.get_rng_state())
    for name in layers:
        assert torch.equal(more[name], again[name]) and not (more[name] & ~little[name]).any()
    assert any(not torch.equal(more[name], other[name]) for name in layers)


def test_what_was_pruned_stays_pruned_unless_all_is_chosen_anew():
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layers = selected_layers(model, every())
    first = prune_block(layers, every(), 0.25)
    model[0].weight.data = torch.tensor([[9.0, 2.0, 3.0, 4.0]])
    assert prune_block(layers, every(), 0.5, first)['0'].tolist() == [[False, False, True, True]]
    assert prune_block(layers, every(), 0.5)['0'].tolist() == [[True, False, False, True]]


def test_infinite_weights_can_be_pruned_too():
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data.fill_(float('inf'))
    apply_masks(model, {'0': torch.tensor([[False, True]])})
    assert model[0].weight.tolist() == [[0, float('inf')]]


# Scores from training.


def statistics(model, block):
    layers = selected_layers(model, block)
    return layers, Statistics(layers, dict.fromkeys(layers, block))


@pytest.mark.parametrize('structured', [False, True])
def test_taylor_terms_are_what_the_loss_would_change(structured):
    """The model is linear in each weight: w g is exactly the change of the loss without it."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    block = every(score='gradient', structured=structured)
    layers, watch = statistics(model, block)
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    model(inputs).sum().backward()
    watch.add_gradients()
    terms = model[0].weight.detach() * inputs
    wanted = terms.sum(1).square() if structured else terms.square()
    torch.testing.assert_close(watch.scores(['0'])['0'], wanted)
    watch.add_gradients()
    torch.testing.assert_close(watch.scores(['0'])['0'], 2 * wanted)
    watch.reset()
    assert watch.scores(['0']) is None


def test_activations_are_means_over_calls_of_training_steps():
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False))
    block = every(score='activation', structured=True)
    layers, watch = statistics(model, block)
    inputs = torch.randn(2, 2, 5, 4)
    model(inputs)  # a validation's
    watch.begin()
    model(inputs), model(3 * inputs), model(inputs[:0])
    summed = []
    watch.finish(lambda vector: summed.append(len(vector)))
    assert summed == [1 + 2 + 3]
    torch.testing.assert_close(
        watch.scores(['0'])['0'], 2 * model(inputs).abs().mean((0, 2, 3)).detach()
    )
    torch.testing.assert_close(watch.totals['0:squares'] / 2, 5 * inputs.square().mean((0, 2, 3)))


def test_single_weights_score_magnitude_times_input():
    """A grouped convolution: the second group's inputs are ten times the first's."""
    conv = nn.Conv2d(4, 2, 1, groups=2, bias=False)
    conv.weight.data.fill_(-2)
    block = every(score='activation')
    layer = find_layers(nn.Sequential(conv))['0']
    scores = activation_scores(layer, block, torch.tensor([1.0, 4.0, 100.0, 400.0]), torch.ones(2))
    assert scores.flatten().tolist() == [2, 4, 20, 40]


def test_linear_layers_have_channels_last():
    model = nn.Sequential(nn.Linear(3, 2))
    layers, watch = statistics(model, every(score='activation'))
    inputs = torch.randn(2, 7, 3)
    watch.begin()
    model(inputs)
    watch.finish(lambda vector: None)
    wanted = model[0].weight.detach().abs() * inputs.square().mean((0, 1)).sqrt()
    torch.testing.assert_close(watch.scores(['0'])['0'], wanted)


def test_scores_go_on_where_a_run_ended():
    model = net()
    layers, watch = statistics(model, every(score='gradient'))
    model(torch.randn(4, 2, 3, 3)).sum().backward()
    watch.add_gradients()
    _, other = statistics(model, every(score='gradient'))
    other.load(watch.totals)
    for name, value in watch.scores(list(layers)).items():
        assert torch.equal(other.scores(list(layers))[name], value) and value.any()


# Schedules.


@pytest.mark.parametrize(
    'schedule, shares',
    [
        ('one_shot', [0, 0, 0.875, 0.875, 0.875, 0.875, 0.875, 0.875]),
        # Half of what is left, three times.
        ('iterative', [0, 0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875]),
        # 0.875 (1 - (1 - 1/2)^3) in the middle.
        ('cubic', [0, 0, 0, 0, 0.765625, 0.765625, 0.875, 0.875]),
    ],
)
def test_schedules(schedule, shares):
    given = [share_at(schedule, step, 2, 6, 2, 0.875) for step in range(8)]
    assert given == pytest.approx(shares) and given[-1] == 0.875


def test_a_schedule_of_uneven_length_grows_and_ends_at_its_end():
    for schedule in ('iterative', 'cubic'):
        shares = [share_at(schedule, step, 1, 6, 2, 0.6) for step in range(9)]
        assert shares == sorted(shares) and shares[5] < shares[6] == shares[8] == 0.6
    assert share_at('cubic', 3, 3, 3, 1, 0.6) == 0.6


# Masks on disk.


@pytest.mark.parametrize('shape', [(3, 5), (2, 2, 2), (1, 1), (16, 4)])
def test_masks_as_bits(shape):
    mask = torch.rand(shape) > 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_mask(packed, shape), mask)


# Refusals.


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(target=1), 'its target is 1; it must be at least 0 and below 1'),
        (dict(target=-0.1), 'at least 0'),
        (dict(target='30%'), 'at least 0'),
        (dict(score='luck'), 'none of magnitude'),
        (dict(over='all'), 'none of block'),
        (dict(modules='backbone'), 'a list of patterns'),
    ],
)
def test_blocks_that_cannot_be(settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        every(**settings)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'settings, said',
    [
        (
            dict(modules=['*', 'nekc']),
            "'nekc' matches no module with weights; the model has 0, 2, 4",
        ),
        (dict(exclude=['*']), 'leaves no layer'),
        (dict(exclude=['zzz']), "'zzz' matches no module"),
        (dict(target=0.999), "block 'all' would be pruned to nothing: 126 of its 126 weights"),
        (dict(target=0.9, structured=True), 'pruned to nothing: 14 of its 15 channels'),
        (
            dict(target=0.99, over='layer', modules=['2']),
            "layer '2' of block 'all' would be pruned to nothing",
        ),
    ],
)
def test_blocks_that_do_not_fit(settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        prune_weights(net(), [every(**settings)])
    assert '\n' not in str(caught.value)


def test_blocks_must_not_overlap():
    with pytest.raises(UsageError, match="'2' is in two blocks, 'all' and 'second'"):
        layers_of_blocks(net(), [every(), PruningBlock('second', ['2'], 0.5)])


def test_scores_from_training_are_asked_for():
    with pytest.raises(UsageError, match="score='gradient' needs scores from training steps"):
        prune_weights(net(), [every(score='gradient')])
