"""Features carried from frame to frame."""

import pytest
import torch
from torch import nn

from dynamicdet.errors import UsageError
from dynamicdet.video import Propagation


def identity(conv: nn.Conv2d, scale: float = 1.0, channels: slice = slice(None)) -> None:
    """Let a 1x1 convolution give some channels as they are, the others as 0."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    each = torch.arange(len(conv.weight))[channels]
    conv.weight.data[each, each] = scale


def always(mix: Propagation, share: float) -> Propagation:
    """Fix w near 0 or 1."""
    nn.init.zeros_(mix.weigh.weight)
    nn.init.constant_(mix.weigh.bias, 40 * (2 * share - 1))
    return mix


def once(count=1):
    return torch.ones(count, dtype=torch.long)


def test_a_shifted_copy_is_found_again():
    """16 cells that look different (a channel each) carry secrets in four more channels. In the
    next frame all moved by (1, 2), and their secrets are unknown: attention brings them."""
    mix = always(Propagation(20, size=4), 1)
    looks, secrets = torch.eye(16).reshape(1, 16, 4, 4), torch.rand(1, 4, 4, 4)
    for conv in (mix.query, mix.key):
        identity(conv, 20, slice(16))
    before = torch.cat([looks, secrets], dim=1)
    now = torch.cat([looks.roll((1, 2), (2, 3)), torch.zeros_like(secrets)], dim=1)
    found = mix(now, mix.remember(before), once())
    assert torch.allclose(found, before.roll((1, 2), (2, 3)), atol=1e-5)


def test_the_formula():
    torch.manual_seed(0)
    mix, now, before = Propagation(8, size=2), torch.randn(2, 8, 3, 5), torch.randn(2, 8, 4, 4)
    tokens = before.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5))
    with torch.no_grad():
        found = mix(now, mix.remember(before), once(2))
        query, key, value = (
            conv(x).flatten(2)
            for conv, x in ((mix.query, now), (mix.key, tokens), (mix.value, tokens))
        )
        share = (query.transpose(1, 2) @ key / 8**0.5).softmax(dim=2)
        aligned = (value @ share.transpose(1, 2)).reshape(now.shape)
        w = mix.weigh(torch.cat([aligned, now], dim=1)).sigmoid()
    assert torch.allclose(found, w * aligned + (1 - w) * now, atol=1e-6)
    # A tenth of memory to begin with, and values that are features.
    assert 0.05 < w.mean() < 0.25 and torch.allclose(mix.value(tokens), tokens)


def test_without_weight_features_stay():
    mix, now = always(Propagation(8, size=2), 0), torch.randn(1, 8, 4, 4)
    assert torch.allclose(mix(now, torch.randn(1, 8, 4, 4), once()), now, atol=1e-6)


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (13, 2), (40, 24)])
@pytest.mark.parametrize('options', [dict(), dict(positional=True, gaps=3)])
def test_any_size(size, options):
    mix, now = Propagation(8, size=3, **options), torch.randn(2, 8, *size)
    memory = mix.remember(now)
    assert memory.shape == (2, 8, 6, 6)
    assert mix(now, memory, once(2)).shape == now.shape


def test_every_parameter_learns():
    mix = Propagation(8, size=2, positional=True, gaps=4)
    now, before = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    mix(now, mix.remember(before), torch.tensor([1, 9])).square().sum().backward()
    for name, parameter in mix.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_gaps_are_told():
    mix = Propagation(8, size=2, gaps=3)
    now, memory = torch.randn(1, 8, 2, 2), torch.randn(1, 8, 4, 4)
    outputs = [mix(now, memory, torch.tensor([gap])) for gap in (1, 2)]
    # Nothing is known of them yet.
    assert torch.equal(*outputs)
    nn.init.normal_(mix.gap.weight)
    one, two, three, four, nine = (mix(now, memory, torch.tensor([gap])) for gap in (1, 2, 3, 4, 9))
    assert not torch.allclose(one, two) and not torch.allclose(two, three)
    assert torch.equal(three, four) and torch.equal(four, nine)


@pytest.mark.parametrize('positional', [False, True])
def test_places_are_told(positional):
    """All cells of the memory look the same, but for their values' being of a place."""
    mix = always(Propagation(8, size=2, positional=positional), 1)
    for conv in (mix.query, mix.key):
        identity(conv, 3)
    found = mix(torch.zeros(1, 8, 2, 2), torch.rand(1, 8, 4, 4), once())
    varied = found.std(dim=(2, 3)).max()
    assert varied > 1e-2 if positional else varied < 1e-6


@pytest.mark.parametrize(
    'wrong', [dict(size=0), dict(gaps=-1), dict(truncate=0), dict(channels=10, positional=True)]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match='propagation takes'):
        Propagation(**wrong)
