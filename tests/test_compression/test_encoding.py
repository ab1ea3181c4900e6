"""Tensors as bytes: exact where promised, near the entropy, the nearest of what is lossy."""

import math

import pytest
import torch
from test_ddz import same_bits, sparse

from dynamicdet.compression.encoding import (
    Lossy,
    binarize_per_channel,
    decode_tensor,
    encode_state,
    quantize_per_channel,
)
from dynamicdet.errors import UsageError


def coded(state, lossy=Lossy()):
    """Key -> encoding, and key -> what comes back; nothing may be there twice."""
    entries = encode_state(state, lossy)
    return (
        {entry.row['key']: entry.row['encoding'] for entry in entries},
        {entry.row['key']: decode_tensor(entry.row, entry.frames) for entry in entries},
    )


@pytest.mark.parametrize('zeros', [0.0, 0.3, 0.5, 0.9])
def test_files_are_small(zeros):
    """Near the entropy: h bits for what is zero, and for what is left 8 bits at most."""
    value = sparse(zeros, 256, 64, 3, 3)
    share = float((value == 0).float().mean())
    bits = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    size = value.numel() / 8
    exact, int8, binary = (
        sum(entry.size for entry in encode_state(dict(w=value), lossy))
        for lossy in (Lossy(), Lossy(int8=()), Lossy(binary=()))
    )
    assert exact < 1.06 * size * (bits + (1 - share) * 28)
    assert int8 < 1.06 * size * (bits + (1 - share) * 8) + 4 * 256
    assert binary < 1.06 * size * (bits + 1 - share) + 4 * 256


def test_the_integers_are_the_nearest():
    value = sparse(0.5, 20, 7, 3)
    value[4] = 0
    value[5, 0, 0] = 1e-45
    scale, whole = quantize_per_channel(value)
    assert scale.shape == (20,) and whole.shape == (20, 21) and abs(whole).max() == 127
    back = torch.from_numpy(scale)[:, None, None] * torch.from_numpy(whole).float().view(20, 7, 3)
    keep = [index for index in range(20) if index != 5]
    assert ((back - value).abs()[keep] <= torch.from_numpy(scale)[keep, None, None] * 0.5001).all()
    assert not back[value == 0].any()
    first = coded(dict(w=value), Lossy(int8=()))[1]['w']
    assert same_bits(first, back)
    # Written again without loss: nothing changes any more.
    assert same_bits(coded(dict(w=first))[1]['w'], first)


# One bit for a weight.


def test_signs_and_mean_magnitudes():
    """By hand: means of 1 and 3, of 2 alone, and of nothing."""
    value = torch.tensor([[1.0, -3.0], [0.0, 2.0], [0.0, 0.0]])
    scale, signs = binarize_per_channel(value)
    assert scale.tolist() == [2, 2, 0] and signs.tolist() == [[1, -1], [0, 1], [0, 0]]
    kinds, back = coded(dict(w=value), Lossy(binary=['w']))
    assert kinds == dict(w='binary') and back['w'].tolist() == [[2, -2], [0, 2], [0, 0]]


def test_the_mean_loses_least():
    """(Rastegari et al. 2016): of a normal distribution 1 - 2 / pi."""
    value = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    scale, signs = (torch.from_numpy(one) for one in binarize_per_channel(value))

    def loss(factor):
        return float(((value - factor * scale[:, None] * signs) ** 2).mean())

    assert loss(1) == pytest.approx(1 - 2 / math.pi, abs=0.01)
    assert loss(1) < min(loss(0.97), loss(1.03))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('zeros', [0, 0.7])
def test_what_is_binary_already_is_found_and_comes_back(dtype, zeros):
    """300 channels have more values than a table holds."""
    value = coded(dict(w=sparse(zeros, 300, 5, 3, 3).to(dtype)), Lossy(binary=()))[1]['w']
    assert value.dtype == dtype and len(value.abs().unique()) > 64
    kinds, back = coded(dict(w=value))
    assert kinds == dict(w='binary') and same_bits(back['w'], value)
    assert (
        sum(entry.size for entry in encode_state(dict(w=value)))
        < value.numel() / 8 * 2 + 4 * 300 + 100
    )


@pytest.mark.parametrize('odd', [-0.0, math.inf, math.nan, 7.0])
def test_what_is_almost_binary_comes_back(odd):
    value = torch.where(torch.randn(300, 40) > 0, 1.0, -1.0) * torch.rand(300, 1)
    value[2] = 0
    value[2, 3] = odd
    value[3, 5] = odd
    kinds, back = coded(dict(w=value))
    assert kinds != dict(w='binary') and same_bits(back['w'], value)


@pytest.mark.parametrize(
    'lossy',
    [Lossy(int8=()), Lossy(codebook=3), Lossy(binary=())],
    ids=['int8', 'codebook', 'binary'],
)
@pytest.mark.parametrize('shape', [(1, 1), (3, 1), (1, 5), (7, 3, 1, 1), (0, 3), (3, 0), (2, 2, 0)])
def test_odd_shapes(shape, lossy):
    value = torch.randn(shape)
    value[:1] = 0
    _, back = coded(dict(w=value), lossy)
    assert back['w'].shape == value.shape and not back['w'][:1].any()
    if value[1:].numel():
        assert (
            torch.nn.functional.cosine_similarity(back['w'].flatten(), value.flatten(), dim=0) > 0.7
        )


def test_patterns_say_what_is_changed():
    state = {
        'a.weight': torch.randn(30, 40),
        'b.weight': torch.randn(30, 40),
        'b.bias': torch.randn(30),
        'c.weight': torch.randn(30, 40).half(),
        'd.weight': torch.randn(30, 40),
    }
    kinds, back = coded(
        state, Lossy(int8=(), codebook=4, codebook_keys=['b.*', 'd.*'], binary=['d.*'])
    )
    assert kinds == {
        'a.weight': 'int8',
        'b.weight': 'codebook',
        'b.bias': 'raw',
        'c.weight': 'int8',
        'd.weight': 'binary',
    }
    assert same_bits(back['b.bias'], state['b.bias']) and back['c.weight'].dtype == torch.float16


# Refusals.


@pytest.mark.parametrize(
    'lossy, said',
    [
        (lambda: Lossy(codebook=1), 'indices of 2 to 8 bits, not of 1'),
        (lambda: Lossy(codebook=9), 'not of 9'),
        (
            lambda: Lossy(int8=['backbnoe.*']),
            "'backbnoe.\\*' matches no weight; a key is such as 'w'",
        ),
        (lambda: Lossy(int8=['b']), "'b' matches no weight"),
        (lambda: Lossy(codebook=4, codebook_keys=['x']), "'x' matches no weight"),
        (lambda: Lossy(binary=['x']), "'x' matches no weight"),
        (
            lambda: Lossy(int8=['n']),
            "'n' holds values that are not finite: it cannot be stored as int8",
        ),
        (lambda: Lossy(binary=['n']), 'cannot be stored as binary'),
    ],
)
def test_what_cannot_be_encoded(lossy, said):
    with pytest.raises(UsageError, match=said):
        encode_state(
            dict(w=torch.ones(3, 3), b=torch.ones(3), n=torch.full((2, 2), math.nan)), lossy()
        )
