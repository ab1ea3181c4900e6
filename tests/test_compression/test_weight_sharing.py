"""Shared values: k-means, tied weights, and what trains them."""

import copy

import numpy as np
import pytest
import torch
from test_ddz import sparse
from test_encoding import coded
from torch import nn

from dynamicdet.compression.encoding import Lossy
from dynamicdet.compression.weight_sharing import (
    cluster_weights,
    share_weights,
    tie_gradient,
    tie_weights,
    weight_sharing_of,
)
from dynamicdet.errors import UsageError


def test_a_codebook_of_the_values_that_there_are_is_exact():
    value = torch.tensor([-3.0, 0.0, 1.5, 2.0])[torch.randint(4, (30, 30))]
    table, indices = cluster_weights(value, 2)
    assert table.tolist() == [0, -3, 1.5, 2]
    assert np.array_equal(table[indices].reshape(30, 30), value.numpy())


@pytest.mark.parametrize('bits', [2, 3, 5, 8])
def test_shared_values_are_means_of_their_weights(bits):
    value = sparse(0.4, 30, 40)
    table, indices = cluster_weights(value, bits, iterations=300)
    flat = value.flatten().numpy()
    assert len(table) <= 2**bits and table[0] == 0 and ((flat == 0) == (indices == 0)).all()
    for entry in range(1, len(table)):
        own = flat[indices == entry]
        assert len(own) == 0 or own.mean() == pytest.approx(table[entry], abs=1e-5)
    # Nobody is nearer to another entry.
    nearest = abs(flat[flat != 0, None] - table[1:]).min(1)
    assert abs(flat - table[indices])[flat != 0] == pytest.approx(nearest, abs=1e-6)
    kinds, back = coded(dict(w=value), Lossy(codebook=bits))
    assert kinds == dict(w='codebook') and len(back['w'].unique()) <= 2**bits
    table, indices = cluster_weights(value, bits)
    assert np.array_equal(back['w'].flatten().numpy(), table[indices])


def test_more_bits_lose_less():
    value = torch.randn(200, 200)
    losses = []
    for bits in range(2, 9):
        table, indices = cluster_weights(value, bits)
        losses.append(float(((table[indices] - value.flatten().numpy()) ** 2).mean()))
    assert all(after < before / 2 for before, after in zip(losses, losses[1:]))
    # The best 4 values for a normal distribution lose 0.1175 (Max 1960).
    assert losses[0] == pytest.approx(0.1175, abs=0.004)


def test_no_value_is_wasted_on_the_hole_that_pruning_leaves():
    """Between -1 and 1 there is nothing; 2 bits are zero and three values."""
    value = torch.tensor([-3.0, -2.9, -1.0, 0.0, 0.0, 1.0, 1.1, 3.0] * 10).view(8, 10)
    table, indices = cluster_weights(value, 2)
    assert len(table) == 4 and len(np.unique(indices)) == 4
    # Two values would lose 0.64, the best three 0.32.
    assert float(((table[indices] - value.flatten().numpy()) ** 2).mean()) < 0.4


# Tied weights.

#: Two rows, two values, and two pruned weights: indices 1 1 2 / 2 2 0, the zero in a place of its
#: own.
INDICES = torch.tensor([1, 1, 2, 2, 2, 0], dtype=torch.uint8)
VALUES = [[1.0, 3.0, 5.0], [6.0, 10.0, 9.0]]


def test_the_gradient_of_a_value_is_the_sum_over_its_weights():
    gradient = torch.tensor(VALUES)
    tie_gradient(gradient, weight_sharing_of(INDICES, pruned=True))
    assert gradient.tolist() == [[4, 4, 21], [21, 21, 0]]
    gradient = torch.tensor(VALUES)
    tie_gradient(gradient, weight_sharing_of(INDICES, pruned=True), 'mean')
    assert gradient.tolist() == [[2, 2, 7], [7, 7, 0]]
    # Where index 0 is a value like the others.
    gradient = torch.tensor(VALUES)
    tie_gradient(gradient, weight_sharing_of(INDICES, pruned=False))
    assert gradient.tolist() == [[4, 4, 21], [21, 21, 9]]


def test_it_is_what_autograd_says_of_a_table():
    table, inputs = torch.randn(3, requires_grad=True), torch.randn(4, 3)
    loss = (inputs @ table[INDICES.long()].view(2, 3).t()).square().sum()
    loss.backward()
    weight = table.detach()[INDICES.long()].view(2, 3).requires_grad_()
    (inputs @ weight.t()).square().sum().backward()
    tie_gradient(weight.grad, weight_sharing_of(INDICES, pruned=False))
    torch.testing.assert_close(weight.grad.flatten(), table.grad[INDICES.long()])


def test_tying_takes_the_mean_and_keeps_what_is_tied():
    weight = torch.tensor(VALUES)
    tie_weights(weight, weight_sharing_of(INDICES, pruned=True))
    assert weight.tolist() == [[2, 2, 7], [7, 7, 0]]
    value = torch.tensor([[0.1]]).expand(1000, 1000).clone()
    tie_weights(value, weight_sharing_of(torch.zeros(1_000_000, dtype=torch.uint8), pruned=False))
    assert (value == 0.1).all()


@pytest.mark.parametrize(
    'make',
    [
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1),
    ],
    ids=['SGD', 'AdamW'],
)
def test_tied_weights_move_as_a_table_would(make):
    """Ten steps of both, with momentum and decay."""
    table = nn.Parameter(torch.tensor([0.0, -1.0, 2.0]))
    sharing = weight_sharing_of(INDICES, pruned=True)
    weight = nn.Parameter(table.detach()[INDICES.long()].view(2, 3))
    generator = torch.Generator().manual_seed(0)
    ours, theirs = make([weight]), make([table])
    for _ in range(10):
        inputs = torch.randn(4, 3, generator=generator)
        for optimizer, own in ((ours, weight), (theirs, table[INDICES.long()].view(2, 3))):
            optimizer.zero_grad()
            (inputs @ own.t()).square().sum().backward()
            if optimizer is ours:
                tie_gradient(weight.grad, sharing)
            else:
                table.grad[0] = 0
            optimizer.step()
        tie_weights(weight.data, sharing)
        torch.testing.assert_close(weight.detach().flatten(), table.detach()[INDICES.long()])
    assert not torch.allclose(table, torch.tensor([0.0, -1.0, 2.0]), atol=0.1)


@pytest.mark.parametrize('zeros', [0, 0.5])
def test_a_weight_is_shared_in_place(zeros):
    weight = nn.Parameter(sparse(zeros, 20, 5, 3, 3))
    before = copy.deepcopy(weight.detach())
    sharing = share_weights(weight, 3)
    table, indices = cluster_weights(before, 3)
    assert np.array_equal(weight.detach().flatten().numpy(), table[indices])
    assert torch.equal(weight == 0, before == 0) and sharing.pruned == bool(zeros)
    assert (
        torch.equal(sharing.indices, torch.from_numpy(indices))
        and sharing.members.sum() == weight.numel()
    )


def test_what_is_not_finite_is_not_shared():
    with pytest.raises(UsageError, match='did the training diverge'):
        share_weights(torch.tensor([[1.0, float('nan')]]), 2)
